// Hessians of a micro-batch of 16384 tokens. Rates count the whole square, 2·T·n², of which one triangle
// is computed: more than the product's own peak is possible.
#include "bench/cuda/cuda_bench.h"

namespace quantmill::bench {
namespace {

// How far the last row of sums in units of 2^-20 lies from the matrix's, rounded to such units.
double fixed_point_error(CudaBench& bench, const Tensor& h, const Tensor& sum) {
    const std::int64_t n = h.shape()[0];
    const std::vector<float> row = bench.get(ConstTensorView(h).rows(n - 1, n));
    std::vector<std::int64_t> units(static_cast<std::size_t>(n));
    bench.backend().copy_to_host(ConstTensorView(sum).rows(n * (n - 1) / 2, n * (n + 1) / 2), units.data());
    double worst = 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
        const double exact = std::nearbyint(std::ldexp(double{row[j]}, 20));
        const double error = std::abs(static_cast<double>(units[j]) - exact);
        if (error > 0.0) worst = std::max(worst, error / std::abs(exact));
    }
    return worst;
}

void hessian(CudaBench& bench, std::int64_t n) {
    constexpr std::int64_t kTokens = 16384;
    const std::string shape = fmt::format("T={} n={}", kTokens, n);
    if (!bench.wanted("hessian", shape)) return;
    CudaBackend& backend = bench.backend();
    const Tensor x = bench.random({kTokens, n}, DType::bf16);
    Tensor h = bench.empty({n, n}, DType::f32);
    backend.zero(h);
    const auto run = [&] { backend.accumulate_hessian(x, h); };
    run();
    const std::vector<float> values = bench.get(x);
    double worst = 0.0;
    for (std::int64_t sample = 0; sample < 16; ++sample) {
        const std::int64_t i = n - 1 - sample * 1009 % n;
        const std::int64_t j = sample * 509 % (i + 1);
        double sum = 0.0;
        double magnitude = 0.0;
        for (std::int64_t t = 0; t < kTokens; ++t) {
            sum += double{values[t * n + i]} * double{values[t * n + j]};
            magnitude += std::abs(double{values[t * n + i]} * double{values[t * n + j]});
        }
        const float result = bench.get(ConstTensorView(h).rows(i, i + 1))[j];
        worst = std::max(worst, std::abs(result - sum) / magnitude);
    }
    const double work = 2.0 * kTokens * static_cast<double>(n) * static_cast<double>(n);
    bench.measure({"hessian", shape, work, Unit::flop, worst, 1e-4}, run);

    const std::vector<std::int32_t> exponents(static_cast<std::size_t>(n), 10);
    Tensor sum = bench.empty({n * (n + 1) / 2}, DType::i64);
    backend.zero(sum);
    const double elements = static_cast<double>(n) * static_cast<double>(n + 1) / 2;
    backend.add_fixed_point(h, exponents, sum);
    const double sum_error = fixed_point_error(bench, h, sum);
    bench.measure({"add_fixed_point", shape, 20 * elements, Unit::byte, sum_error, 0.0},
                  [&] { backend.add_fixed_point(h, exponents, sum); });
    const auto decode = [&] { backend.from_fixed_point(sum, exponents, 1.0, h); };
    decode();
    const double decoded_error = fixed_point_error(bench, h, sum);
    bench.measure({"from_fixed_point", shape, 12 * elements, Unit::byte, decoded_error, 0x1p-24}, decode);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_cuda_bench(argc, argv, "Hessians on one GPU", [](CudaBench& bench) {
        for (const std::int64_t n : {4096, 8192, 14336, 28672}) hessian(bench, n);
    });
}
