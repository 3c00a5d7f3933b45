#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/kernels/backend_test.h"

namespace quantmill::testing {
namespace {

class Elementwise : public BackendTest {
protected:
    void expect_near(const std::vector<float>& values, const std::vector<double>& expected,
                     double tolerance) {
        ASSERT_EQ(values.size(), expected.size());
        for (std::size_t i = 0; i < values.size(); ++i) {
            ASSERT_NEAR(values[i], expected[i], tolerance * (std::abs(expected[i]) + 1e-6))
                << "element " << i;
        }
    }
};

TEST_P(Elementwise, ConvertsBetweenAllFloatTypes) {
    SCOPED_TRACE(trace());
    for (const std::int64_t count : {0, 1, 9999}) {
        auto values = normal(count);
        for (float& value : values) value = std::ldexp(value, static_cast<int>(integer(-30, 20)));
        std::vector<Half> halves;
        std::vector<BFloat16> brains;
        for (const float value : values) {
            halves.push_back(to_half(value));
            brains.push_back(to_bfloat16(value));
        }
        Tensor as_float = upload(values, {count});
        Tensor as_half = backend().empty({count}, DType::f16, "f16");
        Tensor as_brain = backend().empty({count}, DType::bf16, "bf16");
        Tensor back = backend().empty({count}, DType::f32, "f32");
        backend().convert(as_float, as_half);
        backend().convert(as_float, as_brain);
        EXPECT_EQ(download<Half>(as_half), halves);
        EXPECT_EQ(download<BFloat16>(as_brain), brains);

        std::vector<float> from_half;
        std::vector<float> from_brain;
        std::vector<Half> brain_to_half;
        for (const Half value : halves) from_half.push_back(to_float(value));
        for (const BFloat16 value : brains) {
            from_brain.push_back(to_float(value));
            brain_to_half.push_back(to_half(to_float(value)));
        }
        backend().convert(as_half, back);
        EXPECT_EQ(download<float>(back), from_half);
        backend().convert(as_brain, back);
        EXPECT_EQ(download<float>(back), from_brain);
        backend().convert(as_brain, as_half);
        EXPECT_EQ(download<Half>(as_half), brain_to_half);
        backend().convert(as_float, back);
        EXPECT_EQ(download<float>(back), values);
    }
    Tensor integers = upload<std::int32_t>({1, 2}, {2});
    Tensor floats = upload<float>({1, 2}, {2});
    EXPECT_THROW(backend().convert(integers, floats), InternalError);
    Tensor three = upload<float>({1, 2, 3}, {3});
    EXPECT_THROW(backend().convert(three, floats), InternalError);
}

TEST_P(Elementwise, EmbedCopiesRows) {
    SCOPED_TRACE(trace());
    const auto table = normal(7 * 5);
    const std::vector<std::int32_t> ids{3, 0, 6, 6};
    Tensor out = activation_tensor({4, 5});
    backend().embed(ids, upload_activation(table, {7, 5}), out);
    const auto rows = download_activation(out);
    for (std::size_t t = 0; t < ids.size(); ++t) {
        for (std::size_t c = 0; c < 5; ++c) EXPECT_EQ(rows[t * 5 + c], table[ids[t] * 5 + c]);
    }
    Tensor halves = backend().empty({7, 5}, DType::f16, "table");
    backend().convert(upload(table, {7, 5}), halves);
    backend().embed(ids, halves, out);
    EXPECT_EQ(download_activation(out)[0], to_float(to_half(table[15])));
    for (const std::int32_t bad : {-1, 7}) {
        const std::vector<std::int32_t> wrong{0, 0, 0, bad};
        EXPECT_THROW(backend().embed(wrong, halves, out), InternalError);
    }
}

TEST_P(Elementwise, RmsNorm) {
    SCOPED_TRACE(trace());
    for (const std::int64_t columns : {1, 15, 16, 64, 577}) {
        const std::int64_t rows = integer(1, 40);
        const auto x = normal(rows * columns, columns == 64 ? 1e-3 : 100.0);  // small: eps counts
        const auto weight = normal(columns);
        Tensor out = activation_tensor({rows, columns});
        backend().rms_norm(upload_activation(x, {rows, columns}), upload(weight, {columns}), 1e-5F, out);
        std::vector<double> expected;
        for (std::int64_t row = 0; row < rows; ++row) {
            double squares = 0.0;
            for (std::int64_t c = 0; c < columns; ++c) squares += std::pow(x[row * columns + c], 2);
            const double root = std::sqrt(squares / static_cast<double>(columns) + double{1e-5F});
            for (std::int64_t c = 0; c < columns; ++c) {
                expected.push_back(double{x[row * columns + c]} / root * double{weight[c]});
            }
        }
        expect_near(download_activation(out), expected, precision());
    }
}

TEST_P(Elementwise, RmsNormOfHeads) {  // Qwen3 normalises each head of [T, H, D]
    SCOPED_TRACE(trace());
    const auto x = normal(3 * 4 * 8);
    const auto weight = normal(8);
    Tensor heads = activation_tensor({3, 4, 8});
    Tensor rows = activation_tensor({12, 8});
    backend().rms_norm(upload_activation(x, {3, 4, 8}), upload(weight, {8}), 1e-6F, heads);
    backend().rms_norm(upload_activation(x, {12, 8}), upload(weight, {8}), 1e-6F, rows);
    EXPECT_EQ(download_activation(heads), download_activation(rows));
}

TEST_P(Elementwise, Add) {
    SCOPED_TRACE(trace());
    const auto x = normal(10001);
    const auto y = normal(10001);
    Tensor sum = upload_activation(y, {10001});
    backend().add(upload_activation(x, {10001}), sum);
    std::vector<double> expected;
    for (std::size_t i = 0; i < x.size(); ++i) expected.push_back(double{x[i]} + double{y[i]});
    expect_near(download_activation(sum), expected, precision());
}

TEST_P(Elementwise, RopeRotatesHalvesAndRestartsWithEachSequence) {
    SCOPED_TRACE(trace());
    const Sequences sequences{{0, 3, 3, 10}};
    constexpr std::int64_t kHeads = 2;
    constexpr std::int64_t kHalf = 5;
    constexpr std::int64_t kPositions = 8;
    std::vector<float> cos_sin(2 * kPositions * kHalf);
    for (std::int64_t i = 0; i < kPositions * kHalf; ++i) {
        cos_sin[i] = static_cast<float>(std::cos(0.3 * static_cast<double>(i)));
        cos_sin[kPositions * kHalf + i] = static_cast<float>(std::sin(0.3 * static_cast<double>(i)));
    }
    const auto x = normal(10 * kHeads * 2 * kHalf);
    Tensor rotated = upload_activation(x, {10, kHeads, 2 * kHalf});
    backend().rope(rotated, sequences, upload(cos_sin, {2, kPositions, kHalf}));
    std::vector<double> expected(x.size());
    for (std::int64_t t = 0; t < 10; ++t) {
        const std::int64_t position = t < 3 ? t : t - 3;
        for (std::int64_t h = 0; h < kHeads; ++h) {
            const std::int64_t at = (t * kHeads + h) * 2 * kHalf;
            for (std::int64_t i = 0; i < kHalf; ++i) {
                const double c = cos_sin[position * kHalf + i];
                const double s = cos_sin[(kPositions + position) * kHalf + i];
                expected[at + i] = double{x[at + i]} * c - double{x[at + i + kHalf]} * s;
                expected[at + i + kHalf] = double{x[at + i + kHalf]} * c + double{x[at + i]} * s;
            }
        }
    }
    const auto result = download_activation(rotated);
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(result[i], expected[i], 3 * precision());
    Tensor short_table = upload(std::vector<float>(2 * 6 * kHalf), {2, 6, kHalf});
    EXPECT_THROW(backend().rope(rotated, sequences, short_table), InternalError);
}

TEST_P(Elementwise, SiluMul) {
    SCOPED_TRACE(trace());
    auto gate = normal(9000, 5.0);
    for (const float extreme : {0.0F, -200.0F, 200.0F, -87.5F, 88.5F, -3e38F, 3e38F}) {
        gate.push_back(extreme);
    }
    const auto count = static_cast<std::int64_t>(gate.size());
    const auto up = normal(count, 0.01);
    Tensor out = activation_tensor({count});
    backend().silu_mul(upload_activation(gate, {count}), upload_activation(up, {count}), out);
    const auto result = download_activation(out);
    for (std::size_t i = 0; i < gate.size(); ++i) {
        const double g = gate[i];
        const double expected = g / (1.0 + std::exp(-g)) * double{up[i]};
        ASSERT_NEAR(result[i], expected, precision() * std::abs(expected) + 1e-30) << g;
    }
}

TEST_P(Elementwise, CrossEntropyIsDoublePrecise) {
    SCOPED_TRACE(trace());
    for (const std::int64_t vocabulary : {1, 2, 17, 5000}) {
        const std::int64_t tokens = 20;
        auto logits = normal(tokens * vocabulary, 10.0);
        logits[0] = 3000.0F;  // far above the rest
        std::vector<std::int32_t> targets;
        for (std::int64_t t = 0; t < tokens; ++t) {
            targets.push_back(static_cast<std::int32_t>(integer(0, vocabulary - 1)));
        }
        const auto losses = backend().cross_entropy(upload(logits, {tokens, vocabulary}), targets);
        for (std::int64_t t = 0; t < tokens; ++t) {
            const float* row = logits.data() + t * vocabulary;
            const long double highest = *std::max_element(row, row + vocabulary);
            long double sum = 0.0L;
            for (std::int64_t i = 0; i < vocabulary; ++i) sum += std::exp(row[i] - highest);
            const auto expected = static_cast<double>(highest + std::log(sum) - row[targets[t]]);
            ASSERT_NEAR(losses[t], expected, 1e-13 * (1.0 + std::abs(expected)));
        }
    }
    Tensor logits = upload(std::vector<float>(6, 0.0F), {2, 3});
    EXPECT_THROW(static_cast<void>(backend().cross_entropy(logits, std::vector<std::int32_t>{0, 3})),
                 InternalError);
}

TEST_P(Elementwise, LogitDistances) {
    SCOPED_TRACE(trace());
    for (const std::int64_t vocabulary : {1, 3, 17, 1001}) {
        const std::int64_t tokens = 23;
        const auto reference = normal(tokens * vocabulary, 4.0F);
        auto logits = normal(tokens * vocabulary, 4.0F);
        std::copy_n(reference.begin(), vocabulary, logits.begin());  // the first row agrees in all
        const auto distances = backend().logit_distances(upload(reference, {tokens, vocabulary}),
                                                         upload(logits, {tokens, vocabulary}));
        for (std::int64_t t = 0; t < tokens; ++t) {
            const float* expected = reference.data() + t * vocabulary;
            const float* row = logits.data() + t * vocabulary;
            long double expected_sum = 0.0L;
            long double sum = 0.0L;
            for (std::int64_t i = 0; i < vocabulary; ++i) {
                expected_sum += std::exp(static_cast<long double>(expected[i]));
                sum += std::exp(static_cast<long double>(row[i]));
            }
            long double divergence = 0.0L;
            for (std::int64_t i = 0; i < vocabulary; ++i) {
                const long double p = std::exp(static_cast<long double>(expected[i])) / expected_sum;
                divergence += p * std::log(p / (std::exp(static_cast<long double>(row[i])) / sum));
            }
            ASSERT_NEAR(distances[t].divergence, static_cast<double>(divergence), 1e-12);
            ASSERT_EQ(distances[t].same_top, std::max_element(expected, expected + vocabulary) - expected ==
                                                 std::max_element(row, row + vocabulary) - row);
        }
    }
    // Of equal logits the first is the top.
    const auto tied = backend().logit_distances(upload(std::vector<float>{1, 2, 2, 0, 1, 1}, {2, 3}),
                                                upload(std::vector<float>{0, 3, 1, 0, 0, 3}, {2, 3}));
    EXPECT_TRUE(tied[0].same_top);
    EXPECT_FALSE(tied[1].same_top);
}

TEST_P(Elementwise, PermuteColumns) {
    SCOPED_TRACE(trace());
    const std::int64_t rows = 9;
    const std::int64_t columns = 33;
    const auto order = permutation(columns);
    const auto x = normal(rows * columns);
    std::vector<std::uint8_t> codes(x.size());
    for (auto& code : codes) code = static_cast<std::uint8_t>(integer(0, 255));
    Tensor floats = backend().empty({rows, columns}, DType::f32, "floats");
    Tensor bytes = backend().empty({rows, columns}, DType::u8, "bytes");
    backend().permute_columns(upload(x, {rows, columns}), order, floats);
    backend().permute_columns(upload(codes, {rows, columns}), order, bytes);
    const auto permuted = download<float>(floats);
    const auto permuted_codes = download<std::uint8_t>(bytes);
    for (std::int64_t i = 0; i < rows * columns; ++i) {
        const std::int64_t from = i / columns * columns + order[i % columns];
        ASSERT_EQ(permuted[i], x[from]);
        ASSERT_EQ(permuted_codes[i], codes[from]);
    }
}

TEST_P(Elementwise, ZeroColumns) {
    auto x = normal(12);
    Tensor tensor = upload(x, {3, 4});
    backend().zero_columns(std::vector<std::int32_t>{3, 1}, tensor);
    for (const int i : {1, 3, 5, 7, 9, 11}) x[i] = 0.0F;
    EXPECT_EQ(download<float>(tensor), x);
    EXPECT_THROW(backend().zero_columns(std::vector<std::int32_t>{4}, tensor), InternalError);
}

TEST_P(Elementwise, SquaredDistance) {
    SCOPED_TRACE(trace());
    for (const std::int64_t columns : {1, 16, 1000}) {
        const auto a = normal(3 * columns);
        const auto b = normal(3 * columns);
        const auto distances = backend().squared_distance(upload(a, {3, columns}), upload(b, {3, columns}));
        ASSERT_EQ(distances.size(), 3U);
        for (std::int64_t row = 0; row < 3; ++row) {
            double expected = 0.0;
            for (std::int64_t c = 0; c < columns; ++c) {
                expected += std::pow(double{a[row * columns + c]} - double{b[row * columns + c]}, 2);
            }
            EXPECT_NEAR(distances[row], expected, 1e-13 * expected);
        }
    }
}

TEST_P(Elementwise, Dequantize) {
    SCOPED_TRACE(trace());
    const std::vector<std::uint8_t> codes{0, 255, 7, 8, 3, 1};
    const std::vector<Half> scales{to_half(0.5F), to_half(-2.0F), to_half(1e-3F), to_half(3.0F)};
    const std::vector<std::uint8_t> zeros{8, 0, 255, 2};
    const std::vector<std::int32_t> g_idx{1, 0, 1};
    Tensor out = activation_tensor({2, 3});
    backend().dequantize({upload(codes, {2, 3}), upload(scales, {2, 2}), upload(zeros, {2, 2})}, g_idx, out);
    std::vector<double> expected;
    for (int i = 0; i < 6; ++i) {
        const int group = i / 3 * 2 + g_idx[i % 3];
        expected.push_back(double{to_float(scales[group])} * (codes[i] - zeros[group]));
    }
    expect_near(download_activation(out), expected, precision());
    const std::vector<std::int32_t> wrong{1, 0, 2};
    EXPECT_THROW(backend().dequantize({upload(codes, {2, 3}), upload(scales, {2, 2}), upload(zeros, {2, 2})},
                                      wrong, out),
                 InternalError);
}

TEST_P(Elementwise, ThreadsDoNotChangeABit) {
    SCOPED_TRACE(trace());
    const auto x = normal(std::int64_t{37} * 1001);
    const auto y = normal(std::int64_t{37} * 1001);
    const auto weight = normal(1001);
    const std::vector<std::int32_t> targets(37, 5);
    expect_same_with_any_threads([&] {
        Tensor a = upload_activation(x, {37, 1001});
        Tensor b = upload_activation(y, {37, 1001});
        Tensor out = activation_tensor({37, 1001});
        backend().rms_norm(a, upload(weight, {1001}), 1e-5F, out);
        backend().silu_mul(out, b, a);
        backend().add(out, a);
        const auto losses = backend().cross_entropy(upload(x, {37, 1001}), targets);
        const auto distances = backend().squared_distance(upload(x, {37, 1001}), upload(y, {37, 1001}));
        return std::tuple(download_activation(a), losses, distances);
    });
}

INSTANTIATE_TEST_SUITE_P(Backends, Elementwise, ::testing::ValuesIn(built_backends()), backend_name);

}  // namespace
}  // namespace quantmill::testing
