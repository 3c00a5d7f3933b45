// Operations whose speed is the memory's: bytes read and written over time. One element of each result is
// compared with the C library in double precision; the tests compare all.
#include "bench/bench_common.h"

namespace quantmill::bench {
namespace {

double relative(double value, double expected) { return std::abs(value - expected) / std::abs(expected); }

void norms_and_activations(Bench& bench, std::int64_t tokens, std::int64_t columns) {
    const std::string shape = fmt::format("T={} C={}", tokens, columns);
    const auto elements = static_cast<double>(tokens * columns);
    const Tensor x = bench.normal({tokens, columns});
    const Tensor y = bench.normal({tokens, columns});
    const Tensor weight = bench.normal({columns});
    Tensor out = bench.empty({tokens, columns});
    const float* result = out.view().data<float>();
    const double first = x.view().data<float>()[0];
    const double second = y.view().data<float>()[0];

    if (bench.wanted("rms_norm", shape)) {
        const auto run = [&] { bench.backend().rms_norm(x, weight, 1e-5F, out); };
        run();
        double squares = 0.0;
        for (std::int64_t c = 0; c < columns; ++c) squares += std::pow(x.view().data<float>()[c], 2);
        const double expected = first / std::sqrt(squares / static_cast<double>(columns) + 1e-5) *
                                double{weight.view().data<float>()[0]};
        bench.measure({"rms_norm", shape, elements * 8, Unit::byte, relative(result[0], expected), 1e-6},
                      run);
    }
    if (bench.wanted("silu_mul", shape)) {
        const auto run = [&] { bench.backend().silu_mul(x, y, out); };
        run();
        const double expected = first / (1 + std::exp(-first)) * second;
        bench.measure({"silu_mul", shape, elements * 12, Unit::byte, relative(result[0], expected), 1e-6},
                      run);
    }
    if (bench.wanted("add", shape)) {
        bench.backend().copy(y, out);
        bench.backend().add(x, out);
        const double error = relative(result[0], first + second);
        bench.measure({"add", shape, elements * 12, Unit::byte, error, 1e-6},
                      [&] { bench.backend().add(x, out); });
    }
}

void rope(Bench& bench, std::int64_t tokens, std::int64_t heads, std::int64_t width) {
    const std::string shape = fmt::format("T={} H={} D={}", tokens, heads, width);
    if (!bench.wanted("rope", shape)) return;
    const Tensor start = bench.normal({tokens, heads, width});
    Tensor x = bench.empty({tokens, heads, width});
    bench.backend().copy(start, x);
    const Tensor cos_sin = bench.normal({2, tokens, width / 2}, 0.5F);
    const Sequences sequences{{0, static_cast<std::int32_t>(tokens)}};
    const auto run = [&] { bench.backend().rope(x, sequences, cos_sin); };
    run();
    const float* before = start.view().data<float>();
    const float* angles = cos_sin.view().data<float>();
    const double expected = double{before[0]} * double{angles[0]} -
                            double{before[width / 2]} * double{angles[tokens * width / 2]};
    const double error = relative(x.view().data<float>()[0], expected);
    const auto elements = static_cast<double>(tokens * heads * width);
    bench.measure({"rope", shape, elements * 8, Unit::byte, error, 1e-5}, run);
}

void convert(Bench& bench, DType from, DType to, std::int64_t count) {
    const std::string shape = fmt::format("{} -> {}, {}", name_of(from), name_of(to), count);
    if (!bench.wanted("convert", shape)) return;
    const Tensor exact = bench.normal({count});
    Tensor source = bench.empty({count}, from);
    Tensor destination = bench.empty({count}, to);
    Tensor back = bench.empty({count});
    bench.backend().convert(exact, source);
    const auto run = [&] { bench.backend().convert(source, destination); };
    run();
    bench.backend().convert(destination, back);
    const double error = relative(back.view().data<float>()[0], exact.view().data<float>()[0]);
    const auto bytes = static_cast<double>(count) * static_cast<double>(size_of(from) + size_of(to));
    bench.measure({"convert", shape, bytes, Unit::byte, error, 4e-3}, run);
}

void cross_entropy(Bench& bench, std::int64_t tokens, std::int64_t vocabulary) {
    const std::string shape = fmt::format("T={} V={}", tokens, vocabulary);
    if (!bench.wanted("cross_entropy", shape)) return;
    const Tensor logits = bench.normal({tokens, vocabulary}, 3.0F);
    const std::vector<std::int32_t> targets(static_cast<std::size_t>(tokens), 7);
    std::vector<double> losses;
    const auto run = [&] { losses = bench.backend().cross_entropy(logits, targets); };
    run();
    const float* row = logits.view().data<float>();
    double sum = 0.0;
    for (std::int64_t i = 0; i < vocabulary; ++i) sum += std::exp(double{row[i]});
    const double error = relative(losses[0], std::log(sum) - double{row[7]});
    bench.measure(
        {"cross_entropy", shape, static_cast<double>(tokens * vocabulary) * 8, Unit::byte, error, 1e-12},
        run);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill;
    using namespace quantmill::bench;
    return run_bench(argc, argv, "memory-bound operations", [](Bench& bench) {
        norms_and_activations(bench, 2048, 576);
        norms_and_activations(bench, 2048, 1536);
        norms_and_activations(bench, 2048, 14336);
        rope(bench, 2048, 9, 64);
        rope(bench, 2048, 32, 128);
        convert(bench, DType::bf16, DType::f32, 1 << 24);
        convert(bench, DType::f16, DType::f32, 1 << 24);
        convert(bench, DType::f32, DType::bf16, 1 << 24);
        convert(bench, DType::f32, DType::f16, 1 << 24);
        cross_entropy(bench, 512, 49152);
    });
}
