// GPTQ solves without the factor; the error is the relative difference of the loss of 256 rows from the
// CPU backend's, which computes in fp32.
#include "bench/cuda/problem.h"
#include "kernels/cpu/cpu_backend.h"

namespace quantmill::bench {
namespace {

struct Result {
    Tensor codes, scales, zeros, loss;
    Result(Backend& backend, std::int64_t rows, std::int64_t columns, const QuantizationGrid& grid)
        : codes(backend.empty({rows, columns}, DType::u8, "codes")),
          scales(backend.empty({rows, grid.groups(columns)}, DType::f16, "scales")),
          zeros(backend.empty({rows, grid.groups(columns)}, DType::u8, "zeros")),
          loss(backend.empty({rows}, DType::f32, "loss")) {}
    QuantizedViews views() { return {codes, scales, zeros}; }
};

// Returns the loss's relative difference and prints the share of codes that differ.
double loss_error(CudaBench& bench, const Tensor& weights, const std::vector<float>& factor,
                  const QuantizationGrid& grid, const Result& result) {
    constexpr std::int64_t kRows = 256;
    const std::int64_t columns = weights.shape()[1];
    CpuBackend cpu(16);
    Tensor cpu_factor = cpu.empty({columns, columns}, DType::f32, "factor");
    cpu.copy_from_host(factor.data(), cpu_factor);
    Tensor cpu_weights = cpu.empty({kRows, columns}, DType::f32, "weights");
    const std::vector<float> rows = bench.get(ConstTensorView(weights).rows(0, kRows));
    cpu.copy_from_host(rows.data(), cpu_weights);
    Result expected(cpu, kRows, columns, grid);
    cpu.gptq_solve(cpu_weights, cpu_factor, grid, expected.views(), expected.loss);
    const std::vector<float> losses = bench.get(ConstTensorView(result.loss).rows(0, kRows));
    double sum = 0.0;
    double cpu_sum = 0.0;
    for (std::int64_t r = 0; r < kRows; ++r) {
        sum += losses[r];
        cpu_sum += expected.loss.view().data<float>()[r];
    }
    std::vector<std::uint8_t> codes(kRows * columns);
    bench.backend().copy_to_host(ConstTensorView(result.codes).rows(0, kRows), codes.data());
    const auto* cpu_codes = expected.codes.view().data<std::uint8_t>();
    std::int64_t flips = 0;
    for (std::size_t i = 0; i < codes.size(); ++i) flips += codes[i] != cpu_codes[i];
    fmt::print("  {:.3f}% of the codes differ from the CPU's\n",
               100.0 * static_cast<double>(flips) / static_cast<double>(codes.size()));
    return std::abs(sum / cpu_sum - 1.0);
}

// Factors are costly to make and one at a time fills enough memory.
class Factors {
public:
    explicit Factors(CudaBench& bench) : bench_(bench) {}
    void make(std::int64_t columns) {
        if (device_.view().shape().rank() == 2 && device_.shape()[0] == columns) return;
        device_ = Tensor();
        device_ = make_hessian(bench_, columns);
        if (!bench_.backend().reverse_cholesky(device_)) throw InternalError("the factorization failed");
        host_ = bench_.get(device_);
    }
    const Tensor& device() const { return device_; }
    const std::vector<float>& host() const { return host_; }

private:
    CudaBench& bench_;
    Tensor device_;
    std::vector<float> host_;
};

std::string name_of(const QuantizationGrid& grid) {
    constexpr const char* kSearches[] = {"", " mse", " hessian"};
    return fmt::format("W{} g{} {}{}{}", grid.bits, grid.group_size, grid.sym ? "sym" : "asym",
                       kSearches[static_cast<int>(grid.search)], grid.signed_scales ? " signed" : "");
}

void solve(CudaBench& bench, Factors& factors, std::int64_t rows, std::int64_t columns,
           const QuantizationGrid& grid) {
    const std::string shape = fmt::format("{} x {} {}", rows, columns, name_of(grid));
    if (!bench.wanted("solve", shape)) return;
    CudaBackend& backend = bench.backend();
    factors.make(columns);
    const Tensor weights = bench.random({rows, columns}, DType::f32, 0.05F);
    Result result(backend, rows, columns, grid);
    const auto run = [&] {
        backend.gptq_solve(weights, factors.device(), grid, result.views(), result.loss);
    };
    run();
    const double error = loss_error(bench, weights, factors.host(), grid, result);
    const double work = static_cast<double>(rows) * std::pow(static_cast<double>(columns), 2);
    bench.measure({"solve", shape, work, Unit::flop, error, 1e-3}, run);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_cuda_bench(argc, argv, "GPTQ solves on one GPU", [](CudaBench& bench) {
        Factors factors(bench);
        const auto run = [&](std::int64_t rows, std::int64_t columns,
                             const quantmill::QuantizationGrid& grid) {
            solve(bench, factors, rows, columns, grid);
        };
        run(1536, 576, {4, 64, true});  // up to 2048 columns products are fp32's
        run(8192, 2048, {4, 128, true});
        run(8192, 2304, {4, 128, true});
        run(6144, 4096, {4, 128, true});
        run(28672, 4096, {4, 128, true});
        run(8192, 8192, {4, 128, true});
        run(10240, 8192, {4, 128, true});
        run(57344, 8192, {4, 128, true});
        run(57344, 8192, {3, 32, false});
        run(57344, 8192, {4, 1024, true});
        run(8192, 28672, {4, 128, true});
        // What the searches add: each shape again without one.
        using quantmill::ScaleSearch;
        for (const auto& [rows, columns] : {std::pair{10240, 8192}, {57344, 8192}, {8192, 28672}}) {
            run(rows, columns, {4, 128, true, ScaleSearch::minmax, true});
            run(rows, columns, {4, 128, true, ScaleSearch::hessian, true});
            run(rows, columns, {4, 128, true, ScaleSearch::hessian});
            run(rows, columns, {4, 128, true, ScaleSearch::mse});
        }
        run(57344, 8192, {2, 64, true, ScaleSearch::hessian, true});
        run(57344, 8192, {4, 1024, true, ScaleSearch::hessian, true});
    });
}
