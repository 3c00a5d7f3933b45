// The GPTQ solve, R·C² operations, packing and dequantizing. Checked by the identity that defines it:
// the reported loss Σ (target − q)² R_jj² is |(W − Q)·R|², here in double precision.
#include "bench/bench_common.h"

namespace quantmill::bench {
namespace {

Tensor make_factor(Bench& bench, std::int64_t order) {
    const Tensor x = bench.normal({2 * order, order}, 1.0F / std::sqrt(static_cast<float>(order)));
    Tensor h = bench.empty({order, order});
    bench.backend().zero(h);
    bench.backend().accumulate_hessian(x, h);
    if (!bench.backend().reverse_cholesky(h)) throw InternalError("the benchmark's Hessian is singular");
    return h;
}

// The loss of the first rows against |(W − Q)·R|².
double loss_error(const Tensor& weights, const Tensor& factor, const Tensor& dequantized,
                  const Tensor& loss) {
    const std::int64_t columns = weights.shape()[1];
    const float* f = factor.view().data<float>();
    double worst = 0.0;
    for (std::int64_t row = 0; row < std::min<std::int64_t>(4, weights.shape()[0]); ++row) {
        const float* w = weights.view().data<float>() + row * columns;
        const float* q = dequantized.view().data<float>() + row * columns;
        std::vector<double> image(static_cast<std::size_t>(columns), 0.0);
        for (std::int64_t i = 0; i < columns; ++i) {
            for (std::int64_t j = i; j < columns; ++j) {
                const double c = i == j ? 1.0 : double{f[i * columns + j]};
                image[j] += (double{w[i]} - double{q[i]}) * c;
            }
        }
        double expected = 0.0;
        for (std::int64_t j = 0; j < columns; ++j) {
            expected += std::pow(image[j] * double{f[j * columns + j]}, 2);
        }
        const double reported = loss.view().data<float>()[row];
        worst = std::max(worst, std::abs(reported - expected) / expected);
    }
    return worst;
}

void solve(Bench& bench, std::int64_t rows, std::int64_t columns, std::int64_t group_size) {
    const std::string shape = fmt::format("R={} C={} group={}", rows, columns, group_size);
    if (!bench.wanted("gptq_solve pack unpack dequantize", shape)) return;
    const QuantizationGrid grid{4, group_size, true};
    const Tensor factor = make_factor(bench, columns);
    const Tensor weights = bench.normal({rows, columns}, 0.05F);
    Tensor codes = bench.empty({rows, columns}, DType::u8);
    Tensor scales = bench.empty({rows, grid.groups(columns)}, DType::f16);
    Tensor zeros = bench.empty({rows, grid.groups(columns)}, DType::u8);
    Tensor loss = bench.empty({rows});
    Tensor dequantized = bench.empty({rows, columns});
    std::vector<std::int32_t> g_idx;
    for (std::int64_t c = 0; c < columns; ++c) g_idx.push_back(static_cast<std::int32_t>(c / group_size));
    const auto run = [&] { bench.backend().gptq_solve(weights, factor, grid, {codes, scales, zeros}, loss); };
    const auto dequantize = [&] { bench.backend().dequantize({codes, scales, zeros}, g_idx, dequantized); };
    run();
    dequantize();
    const double error = loss_error(weights, factor, dequantized, loss);
    const double elements = static_cast<double>(rows) * static_cast<double>(columns);
    bench.measure({"gptq_solve", shape, elements * static_cast<double>(columns), Unit::flop, error, 1e-3},
                  run);
    // The same solve with each search: what it takes longer is the search's.
    for (const auto& [name, searched] :
         {std::pair{"hessian, signed", QuantizationGrid{4, group_size, true, ScaleSearch::hessian, true}},
          {"mse", QuantizationGrid{4, group_size, true, ScaleSearch::mse}}}) {
        const auto search = [&, own = searched] {
            bench.backend().gptq_solve(weights, factor, own, {codes, scales, zeros}, loss);
        };
        search();
        dequantize();
        bench.measure({"gptq_solve", shape + " " + name, elements * static_cast<double>(columns), Unit::flop,
                       loss_error(weights, factor, dequantized, loss), 1e-3},
                      search);
    }
    run();
    bench.measure({"dequantize", shape, elements * 5, Unit::byte, error, 1e-3}, dequantize);

    Tensor words = bench.empty({columns / 8, rows}, DType::i32);
    Tensor unpacked = bench.empty({rows, columns}, DType::u8);
    const auto pack = [&] { bench.backend().pack(codes, 4, words); };
    const auto unpack = [&] { bench.backend().unpack(words, 4, unpacked); };
    pack();
    unpack();
    const auto* before = codes.view().data<std::uint8_t>();
    const auto* after = unpacked.view().data<std::uint8_t>();
    const double lost = std::equal(before, before + rows * columns, after) ? 0.0 : 1.0;
    bench.measure({"pack", shape, elements * 1.5, Unit::byte, lost, 0.0}, pack);
    bench.measure({"unpack", shape, elements * 1.5, Unit::byte, lost, 0.0}, unpack);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_bench(argc, argv, "GPTQ solve, dequantizing and packing", [](Bench& bench) {
        solve(bench, 192, 576, 64);  // SmolLM2-135M
        solve(bench, 576, 576, 64);
        solve(bench, 1536, 576, 64);
        solve(bench, 576, 1536, 64);
        solve(bench, 576, 1536, 16);
        solve(bench, 576, 1536, 1536);
        solve(bench, 4096, 4096, 128);  // Llama-3-8B
    });
}
