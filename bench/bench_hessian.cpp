// Hessians: accumulation, fixed-point sums and their way back; sampled elements are compared with sums in
// double precision. Operations are counted for the lower triangle only.
#include "bench/bench_common.h"

namespace quantmill::bench {
namespace {

void accumulate(Bench& bench, std::int64_t tokens, std::int64_t order) {
    const std::string shape = fmt::format("T={} C={}", tokens, order);
    if (!bench.wanted("accumulate_hessian", shape)) return;
    const Tensor x = bench.normal({tokens, order});
    Tensor h = bench.empty({order, order});
    bench.backend().zero(h);
    const auto run = [&] { bench.backend().accumulate_hessian(x, h); };
    run();
    double worst = 0.0;
    for (int sample = 0; sample < 200; ++sample) {
        const std::int64_t i = bench.integer(order);
        const std::int64_t j = bench.integer(i + 1);
        double sum = 0.0;
        double magnitude = 0.0;
        for (std::int64_t t = 0; t < tokens; ++t) {
            const float* row = x.view().data<float>() + t * order;
            sum += double{row[i]} * double{row[j]};
            magnitude += std::abs(double{row[i]} * double{row[j]});
        }
        worst = std::max(worst, std::abs(h.view().data<float>()[i * order + j] - sum) / magnitude);
    }
    const double work = static_cast<double>(tokens * order) * static_cast<double>(order + 1);
    bench.measure({"accumulate_hessian", shape, work, Unit::flop, worst, 1e-6}, run);
}

void fixed_point(Bench& bench, std::int64_t order) {
    const std::string shape = fmt::format("C={}", order);
    if (!bench.wanted("fixed_point", shape)) return;
    const Tensor h = bench.normal({order, order});
    Tensor back = bench.empty({order, order});
    const std::int64_t count = order * (order + 1) / 2;
    Tensor sum = bench.empty({count}, DType::i64);
    bench.backend().zero(sum);
    const std::vector<std::int32_t> exponents(static_cast<std::size_t>(order), 15);
    const auto add = [&] { bench.backend().add_fixed_point(h, exponents, sum); };
    const auto read = [&] { bench.backend().from_fixed_point(sum, exponents, 1.0, back); };
    add();
    read();
    double worst = 0.0;
    for (std::int64_t i = 0; i < order; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) {
            const std::int64_t at = i * order + j;
            worst = std::max(
                worst, std::abs(double{h.view().data<float>()[at]} - double{back.view().data<float>()[at]}));
        }
    }
    const auto triangle = static_cast<double>(count);
    bench.measure({"add_fixed_point", shape, triangle * 20, Unit::byte, worst, 1e-8}, add);
    bench.measure({"from_fixed_point", shape, triangle * 12, Unit::byte, worst, 1e-8}, read);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_bench(argc, argv, "Hessians", [](Bench& bench) {
        accumulate(bench, 2048, 576);  // SmolLM2-135M
        accumulate(bench, 2048, 1536);
        accumulate(bench, 2048, 4096);  // Llama-3-8B
        fixed_point(bench, 576);
        fixed_point(bench, 1536);
        fixed_point(bench, 4096);
    });
}
