// Linear layers of a micro-batch; sampled elements are compared with sums in double precision.
#include "bench/bench_common.h"

namespace quantmill::bench {
namespace {

double sampled_error(Bench& bench, const Tensor& x, const Tensor& weight, const Tensor& out) {
    const std::int64_t columns = x.shape()[1];
    const std::int64_t outputs = weight.shape()[0];
    double worst = 0.0;
    for (int sample = 0; sample < 200; ++sample) {
        const std::int64_t t = bench.integer(x.shape()[0]);
        const std::int64_t r = bench.integer(outputs);
        const float* row = x.view().data<float>() + t * columns;
        const float* weights = weight.view().data<float>() + r * columns;
        double sum = 0.0;
        double magnitude = 0.0;
        for (std::int64_t c = 0; c < columns; ++c) {
            sum += double{row[c]} * double{weights[c]};
            magnitude += std::abs(double{row[c]} * double{weights[c]});
        }
        const double value = out.view().data<float>()[t * outputs + r];
        worst = std::max(worst, std::abs(value - sum) / magnitude);
    }
    return worst;
}

void linear(Bench& bench, std::int64_t tokens, std::int64_t columns, std::int64_t outputs) {
    const std::string shape = fmt::format("T={} C={} R={}", tokens, columns, outputs);
    if (!bench.wanted("linear", shape)) return;
    const Tensor x = bench.normal({tokens, columns});
    const Tensor weight = bench.normal({outputs, columns});
    Tensor out = bench.empty({tokens, outputs});
    const auto run = [&] { bench.backend().linear(x, weight, {}, out); };
    run();
    const double work = 2.0 * static_cast<double>(tokens * columns) * static_cast<double>(outputs);
    bench.measure({"linear", shape, work, Unit::flop, sampled_error(bench, x, weight, out), 1e-6}, run);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using quantmill::bench::linear;
    return quantmill::bench::run_bench(argc, argv, "linear layers", [](quantmill::bench::Bench& bench) {
        linear(bench, 2048, 576, 192);  // SmolLM2-135M: k, v
        linear(bench, 2048, 576, 576);  // q, o
        linear(bench, 2048, 576, 1536);
        linear(bench, 2048, 1536, 576);
        linear(bench, 512, 576, 49152);  // its logits
        linear(bench, 2048, 2048, 2048);
        linear(bench, 2048, 4096, 4096);  // Llama-3-8B
    });
}
