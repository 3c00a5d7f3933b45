// The forward pass of a block, 16384 tokens a micro-batch; samples are compared with sums in double.
#include "bench/cuda/cuda_bench.h"

namespace quantmill::bench {
namespace {

constexpr std::int64_t kTokens = 16384;

void linear(CudaBench& bench, std::int64_t columns, std::int64_t outputs) {
    const std::string shape = fmt::format("T={} C={} R={}", kTokens, columns, outputs);
    if (!bench.wanted("linear", shape)) return;
    const Tensor x = bench.random({kTokens, columns}, DType::bf16);
    const Tensor w = bench.random({outputs, columns}, DType::bf16);
    Tensor out = bench.empty({kTokens, outputs}, DType::bf16);
    const auto run = [&] { bench.backend().linear(x, w, {}, out); };
    run();
    double worst = 0.0;
    for (std::int64_t sample = 0; sample < 8; ++sample) {
        const std::int64_t t = sample * 2011 % kTokens;
        const std::int64_t r = sample * 1009 % outputs;
        const std::vector<float> row = bench.get(ConstTensorView(x).rows(t, t + 1));
        const std::vector<float> weights = bench.get(ConstTensorView(w).rows(r, r + 1));
        const std::vector<float> result = bench.get(ConstTensorView(out).rows(t, t + 1));
        double sum = 0.0;
        double magnitude = 0.0;
        for (std::int64_t c = 0; c < columns; ++c) {
            sum += double{row[c]} * double{weights[c]};
            magnitude += std::abs(double{row[c]} * double{weights[c]});
        }
        worst = std::max(worst, std::abs(result[r] - sum) / magnitude);
    }
    const double work = 2.0 * static_cast<double>(kTokens * columns) * static_cast<double>(outputs);
    bench.measure({"linear", shape, work, Unit::flop, worst, 4e-4}, run);
}

// One query of the last sequence against a softmax in double.
double attention_error(CudaBench& bench, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       std::int64_t length, float scale) {
    const std::int64_t heads = q.shape()[1];
    const std::int64_t shared = heads / k.shape()[1];
    const std::int64_t width = q.shape()[2];
    const std::int64_t end = q.shape()[0];
    const auto last = [&](const Tensor& tensor, std::int64_t rows) {
        return bench.get(ConstTensorView(tensor).rows(end - rows, end));
    };
    const std::vector<float> queries = last(q, 1);
    const std::vector<float> keys = last(k, length);
    const std::vector<float> values = last(v, length);
    const std::vector<float> result = last(out, 1);
    const std::int64_t stride = k.shape()[1] * width;
    double error = 0.0;
    double norm = 0.0;
    for (std::int64_t h = 0; h < heads; ++h) {
        std::vector<double> weights(static_cast<std::size_t>(length));
        double sum = 0.0;
        for (std::int64_t t = 0; t < length; ++t) {
            double score = 0.0;
            for (std::int64_t d = 0; d < width; ++d) {
                score += double{queries[h * width + d]} * double{keys[t * stride + h / shared * width + d]};
            }
            weights[t] = std::exp(score * scale);
            sum += weights[t];
        }
        for (std::int64_t d = 0; d < width; ++d) {
            double expected = 0.0;
            for (std::int64_t t = 0; t < length; ++t) {
                expected += weights[t] / sum * values[t * stride + h / shared * width + d];
            }
            error += std::pow(expected - result[h * width + d], 2);
            norm += expected * expected;
        }
    }
    return std::sqrt(error / norm);
}

void attention(CudaBench& bench, std::int64_t heads, std::int64_t kv_heads, std::int64_t width) {
    constexpr std::int64_t kLength = 2048;
    const std::string shape = fmt::format("8 x {}, {}/{} heads of {}", kLength, heads, kv_heads, width);
    if (!bench.wanted("attention", shape)) return;
    Sequences sequences;
    for (std::int64_t end = kLength; end <= kTokens; end += kLength) {
        sequences.offsets.push_back(static_cast<std::int32_t>(end));
    }
    const Tensor q = bench.random({kTokens, heads, width}, DType::bf16, 2.0F);
    const Tensor k = bench.random({kTokens, kv_heads, width}, DType::bf16, 2.0F);
    const Tensor v = bench.random({kTokens, kv_heads, width}, DType::bf16);
    Tensor out = bench.empty({kTokens, heads, width}, DType::bf16);
    const AttentionOptions options{1.0F / std::sqrt(static_cast<float>(width)), 0};
    const auto run = [&] { bench.backend().attention(q, k, v, sequences, options, out); };
    run();
    const double error = attention_error(bench, q, k, v, out, kLength, options.scale);
    // Two products, and half of the scores are masked away.
    const double work = 2.0 * static_cast<double>(kTokens * kLength) * static_cast<double>(heads * width);
    bench.measure({"attention", shape, work, Unit::flop, error, 1e-2}, run);
}

// Rows 0 … 63 of a tensor; every row is computed alike, from its own numbers.
ConstTensorView top(ConstTensorView view) { return view.rows(0, 64); }
constexpr double kRounding = 1.05 * 0x1p-8;  // one rounding to bf16, and fp32 before it

void elementwise(CudaBench& bench, std::int64_t columns, std::int64_t inner) {
    CudaBackend& backend = bench.backend();
    CpuBackend& cpu = bench.cpu();
    const auto bytes = static_cast<double>(kTokens * columns * 2);
    const std::string shape = fmt::format("T={} C={}", kTokens, columns);
    const Tensor x = bench.random({kTokens, columns}, DType::bf16);
    Tensor out = bench.random({kTokens, columns}, DType::bf16);
    if (bench.wanted("rms_norm", shape)) {
        const Tensor weight = bench.random({columns}, DType::f32);
        const auto run = [&] { backend.rms_norm(x, weight, 1e-5F, out); };
        run();
        Tensor expected = cpu.empty({64, columns}, DType::f32, "reference");
        cpu.rms_norm(bench.on_cpu(top(x)), bench.on_cpu(weight), 1e-5F, expected);
        const double error = bench.difference(top(out), expected, 0.0F);
        bench.measure({"rms_norm", shape, 2 * bytes, Unit::byte, error, kRounding}, run);
    }
    if (bench.wanted("add", shape)) {
        Tensor expected = bench.on_cpu(top(out));
        cpu.add(bench.on_cpu(top(x)), expected);
        backend.add(x, out);
        const double error = bench.difference(top(out), expected, 0.0F);
        bench.measure({"add", shape, 3 * bytes, Unit::byte, error, kRounding}, [&] { backend.add(x, out); });
    }
    if (bench.wanted("rope", shape)) {
        Sequences sequences{{0, kTokens}};
        const Tensor table = bench.random({2, kTokens, 64}, DType::f32);
        const TensorView heads = out.view().reshaped({kTokens, columns / 128, 128});
        Tensor expected = bench.on_cpu(top(heads));
        cpu.rope(expected, Sequences{{0, 64}}, bench.on_cpu(table));
        const auto run = [&] { backend.rope(heads, sequences, table); };
        run();
        // A difference of two products in fp32: where they cancel, their own rounding is what is left.
        const double error = bench.difference(top(heads), expected, 1e-3F);
        bench.measure({"rope", shape, 2 * bytes, Unit::byte, error, kRounding}, run);
    }
    const std::string wide = fmt::format("T={} F={}", kTokens, inner);
    if (bench.wanted("silu_mul", wide)) {
        const Tensor gate = bench.random({kTokens, inner}, DType::bf16);
        const Tensor up = bench.random({kTokens, inner}, DType::bf16);
        Tensor product = bench.empty({kTokens, inner}, DType::bf16);
        const auto run = [&] { backend.silu_mul(gate, up, product); };
        run();
        Tensor expected = cpu.empty({64, inner}, DType::f32, "reference");
        cpu.silu_mul(bench.on_cpu(top(gate)), bench.on_cpu(top(up)), expected);
        const double error = bench.difference(top(product), expected, 1e-30F);
        bench.measure(
            {"silu_mul", wide, 6.0 * static_cast<double>(kTokens * inner), Unit::byte, error, kRounding},
            run);
    }
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_cuda_bench(argc, argv, "the forward pass on one GPU", [](CudaBench& bench) {
        attention(bench, 64, 8, 128);  // Llama-3-70B
        attention(bench, 32, 8, 64);
        attention(bench, 32, 32, 80);
        attention(bench, 32, 32, 96);
        attention(bench, 16, 8, 256);
        elementwise(bench, 8192, 28672);
        linear(bench, 8192, 10240);
        linear(bench, 8192, 28672);
        linear(bench, 28672, 8192);
    });
}
