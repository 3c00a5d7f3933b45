#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/kernels/backend_test.h"

namespace quantmill::testing {
namespace {

struct Problem {
    std::vector<std::int64_t> lengths;
    std::int64_t heads;
    std::int64_t kv_heads;
    std::int64_t width;
    std::int64_t window = 0;
    double size = 1.0;  // deviation of queries and keys
};

class Attention : public BackendTest {
protected:
    static Sequences sequences_of(const Problem& p) {
        Sequences sequences;
        for (const std::int64_t length : p.lengths) {
            sequences.offsets.push_back(static_cast<std::int32_t>(sequences.offsets.back() + length));
        }
        return sequences;
    }

    std::vector<float> run(const Problem& p, const std::vector<float>& q, const std::vector<float>& k,
                           const std::vector<float>& v) {
        const Sequences sequences = sequences_of(p);
        const std::int64_t tokens = sequences.tokens();
        Tensor out = activation_tensor({tokens, p.heads, p.width});
        backend().attention(upload_activation(q, {tokens, p.heads, p.width}),
                            upload_activation(k, {tokens, p.kv_heads, p.width}),
                            upload_activation(v, {tokens, p.kv_heads, p.width}), sequences,
                            {1.0F / std::sqrt(static_cast<float>(p.width)), p.window}, out);
        return download_activation(out);
    }

    void check(const Problem& p) {
        SCOPED_TRACE(::testing::Message()
                     << p.lengths.size() << " sequences, first " << p.lengths[0] << ", H=" << p.heads
                     << " K=" << p.kv_heads << " D=" << p.width << " window=" << p.window);
        const Sequences sequences = sequences_of(p);
        const auto q = normal(sequences.tokens() * p.heads * p.width, p.size);
        const auto k = normal(sequences.tokens() * p.kv_heads * p.width, p.size);
        const auto v = normal(sequences.tokens() * p.kv_heads * p.width);
        const auto out = run(p, q, k, v);
        for (std::int64_t s = 0; s < sequences.count(); ++s) {
            for (std::int64_t t = sequences.offsets[s]; t < sequences.offsets[s + 1]; ++t) {
                for (std::int64_t head = 0; head < p.heads; ++head) {
                    const auto expected = brute_force(p, q, k, v, sequences.offsets[s], t, head);
                    for (std::int64_t d = 0; d < p.width; ++d) {
                        ASSERT_NEAR(out[(t * p.heads + head) * p.width + d], expected[d],
                                    5 * precision() * (1.0 + p.size * p.size))
                            << "token " << t << " head " << head;
                    }
                }
            }
        }
    }

private:
    static std::vector<double> brute_force(const Problem& p, const std::vector<float>& q,
                                           const std::vector<float>& k, const std::vector<float>& v,
                                           std::int64_t first, std::int64_t t, std::int64_t head) {
        const std::int64_t kv_head = head / (p.heads / p.kv_heads);
        if (p.window > 0) first = std::max(first, t - p.window + 1);
        std::vector<double> scores;
        for (std::int64_t u = first; u <= t; ++u) {
            double score = 0.0;
            for (std::int64_t d = 0; d < p.width; ++d) {
                score += double{q[(t * p.heads + head) * p.width + d]} *
                         double{k[(u * p.kv_heads + kv_head) * p.width + d]};
            }
            scores.push_back(score / std::sqrt(static_cast<double>(p.width)));
        }
        const double highest = *std::max_element(scores.begin(), scores.end());
        double total = 0.0;
        std::vector<double> result(static_cast<std::size_t>(p.width), 0.0);
        for (std::int64_t u = first; u <= t; ++u) {
            const double weight = std::exp(scores[u - first] - highest);
            total += weight;
            for (std::int64_t d = 0; d < p.width; ++d) {
                result[d] += weight * double{v[(u * p.kv_heads + kv_head) * p.width + d]};
            }
        }
        for (double& value : result) value /= total;
        return result;
    }
};

TEST_P(Attention, EqualsTheSoftmaxOverVisibleTokens) {
    SCOPED_TRACE(trace());
    check({{1}, 1, 1, 1});
    check({{1, 1, 2}, 4, 2, 8});
    check({{300}, 9, 3, 64});           // SmolLM2's heads
    check({{130, 5, 259}, 8, 1, 16});   // one key/value head
    check({{129, 128}, 4, 4, 80});      // no sharing; a width that is no power of two
    check({{40}, 40, 1, 4});            // more sharing heads than a block has rows
    check({{200}, 2, 1, 16, 0, 12.0});  // scores of several hundred
    for (int i = 0; i < 6; ++i) {
        const std::int64_t kv_heads = integer(1, 3);
        check({{integer(1, 200), integer(1, 200)}, kv_heads * integer(1, 4), kv_heads, integer(1, 70)});
    }
}

TEST_P(Attention, WindowLimitsWhatATokenSees) {
    SCOPED_TRACE(trace());
    for (const std::int64_t window : {1, 2, 60, 128, 129, 400}) {
        check({{300, 70}, 4, 2, 16, window});
    }
}

TEST_P(Attention, ThreadsDoNotChangeABit) {
    SCOPED_TRACE(trace());
    const Problem p{{301, 77, 1}, 6, 2, 32};
    const auto q = normal(std::int64_t{379} * 6 * 32);
    const auto k = normal(std::int64_t{379} * 2 * 32);
    const auto v = normal(std::int64_t{379} * 2 * 32);
    expect_same_with_any_threads([&] { return run(p, q, k, v); });
}

TEST_P(Attention, ASequenceDoesNotDependOnItsNeighbours) {
    SCOPED_TRACE(trace());
    const auto q = normal(std::int64_t{200} * 4 * 16);
    const auto k = normal(std::int64_t{200} * 2 * 16);
    const auto v = normal(std::int64_t{200} * 2 * 16);
    const auto both = run({{150, 50}, 4, 2, 16}, q, k, v);
    const auto second = run({{50}, 4, 2, 16}, {q.begin() + 150 * 64, q.end()},
                            {k.begin() + 150 * 32, k.end()}, {v.begin() + 150 * 32, v.end()});
    EXPECT_EQ(std::vector<float>(both.begin() + 150 * 64, both.end()), second);
}

INSTANTIATE_TEST_SUITE_P(Backends, Attention, ::testing::ValuesIn(built_backends()), backend_name);

}  // namespace
}  // namespace quantmill::testing
