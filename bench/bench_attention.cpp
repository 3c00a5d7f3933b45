// Causal attention, 4·D operations a visible pair of tokens and head; sampled tokens are compared with a
// softmax in double precision.
#include "bench/bench_common.h"

namespace quantmill::bench {
namespace {

struct Heads {
    std::int64_t query;
    std::int64_t kv;
    std::int64_t width;
};

double sampled_error(Bench& bench, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                     std::int64_t length, const Heads& heads) {
    double worst = 0.0;
    for (int sample = 0; sample < 20; ++sample) {
        const std::int64_t t = bench.integer(q.shape()[0]);
        const std::int64_t first = t / length * length;
        const std::int64_t head = bench.integer(heads.query);
        const std::int64_t kv_head = head / (heads.query / heads.kv);
        const auto row = [&](const Tensor& x, std::int64_t token, std::int64_t count, std::int64_t h) {
            return x.view().data<float>() + (token * count + h) * heads.width;
        };
        std::vector<double> sums(static_cast<std::size_t>(heads.width), 0.0);
        double total = 0.0;
        for (std::int64_t u = first; u <= t; ++u) {
            double score = 0.0;
            for (std::int64_t d = 0; d < heads.width; ++d) {
                score += double{row(q, t, heads.query, head)[d]} * double{row(k, u, heads.kv, kv_head)[d]};
            }
            const double weight = std::exp(score / std::sqrt(static_cast<double>(heads.width)));
            total += weight;
            for (std::int64_t d = 0; d < heads.width; ++d) {
                sums[d] += weight * double{row(v, u, heads.kv, kv_head)[d]};
            }
        }
        for (std::int64_t d = 0; d < heads.width; ++d) {
            const double value = row(out, t, heads.query, head)[d];
            worst = std::max(worst, std::abs(value - sums[d] / total));
        }
    }
    return worst;
}

void attention(Bench& bench, std::int64_t sequences, std::int64_t length, const Heads& heads) {
    const std::string shape =
        fmt::format("{}x{} H={} K={} D={}", sequences, length, heads.query, heads.kv, heads.width);
    if (!bench.wanted("attention", shape)) return;
    Sequences offsets;
    for (std::int64_t s = 1; s <= sequences; ++s) {
        offsets.offsets.push_back(static_cast<std::int32_t>(s * length));
    }
    const std::int64_t tokens = offsets.tokens();
    const Tensor q = bench.normal({tokens, heads.query, heads.width});
    const Tensor k = bench.normal({tokens, heads.kv, heads.width});
    const Tensor v = bench.normal({tokens, heads.kv, heads.width});
    Tensor out = bench.empty({tokens, heads.query, heads.width});
    const AttentionOptions options{1.0F / std::sqrt(static_cast<float>(heads.width)), 0};
    const auto run = [&] { bench.backend().attention(q, k, v, offsets, options, out); };
    run();
    const double pairs = static_cast<double>(sequences * length) * static_cast<double>(length + 1) / 2;
    bench.measure({"attention", shape, pairs * static_cast<double>(4 * heads.query * heads.width), Unit::flop,
                   sampled_error(bench, q, k, v, out, length, heads), 1e-5},
                  run);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_bench(argc, argv, "causal attention", [](Bench& bench) {
        attention(bench, 4, 512, {9, 3, 64});  // SmolLM2-135M
        attention(bench, 1, 2048, {9, 3, 64});
        attention(bench, 1, 2048, {32, 8, 128});  // Llama-3-8B
        attention(bench, 1, 4096, {64, 8, 128});  // Llama-3-70B
    });
}
