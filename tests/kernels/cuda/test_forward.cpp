#include <numeric>
#include <tuple>

#include "tests/kernels/cuda/fixture.h"

namespace quantmill::testing {
namespace {

using Forward = CudaTest;

std::vector<float> absolute(std::vector<float> values) {
    for (float& value : values) value = std::abs(value);
    return values;
}

TEST_F(Forward, convert_rounds_like_the_cpu) {
    std::vector<float> values = normal(5003, 100.0F);
    values[0] = 1e-7F;        // subnormal in fp16
    values[1] = 70000.0F;     // infinite in fp16
    values[2] = 1.00390625F;  // a tie in bf16
    for (const DType type : {DType::f16, DType::bf16}) {
        const Tensor a = put(cpu(), values, {5003}, type);
        const Tensor b = put(cuda(), values, {5003}, type);
        EXPECT_EQ(get_floats(a), get_floats(b)) << name_of(type);
    }
    const Tensor half = put(cuda(), values, {5003}, DType::f16);
    Tensor bf16 = poisoned(cuda(), {5003}, DType::bf16);
    cuda().convert(half, bf16);
    const Tensor cpu_half = put(cpu(), values, {5003}, DType::f16);
    Tensor cpu_bf16 = poisoned(cpu(), {5003}, DType::bf16);
    cpu().convert(cpu_half, cpu_bf16);
    EXPECT_EQ(get_floats(bf16), get_floats(cpu_bf16));
}

TEST_F(Forward, embed_gathers_rows) {
    const std::vector<float> table = activations(50 * 72);
    std::vector<std::int32_t> ids(33);
    for (auto& id : ids) id = static_cast<std::int32_t>(integer(0, 49));
    for (const DType type : {DType::f32, DType::f16, DType::bf16}) {
        const Tensor rows = put(cuda(), table, {50, 72}, type);
        Tensor out = poisoned(cuda(), {33, 72}, DType::bf16);
        cuda().embed(ids, rows, out);
        const std::vector<float> result = get_floats(out);
        const std::vector<float> source = get_floats(rows);
        for (std::size_t i = 0; i < result.size(); ++i) {
            const float expected = source[static_cast<std::size_t>(ids[i / 72]) * 72 + i % 72];
            ASSERT_EQ(result[i], to_float(to_bfloat16(expected)));
        }
    }
    const std::vector<std::int32_t> outside{50};
    Tensor out = cuda().empty({1, 72}, DType::bf16, "test");
    EXPECT_THROW(cuda().embed(outside, put(cuda(), table, {50, 72}), out), InternalError);
}

TEST_F(Forward, rms_norm) {
    std::vector<std::pair<std::int64_t, std::int64_t>> shapes{{5, 7},    {9, 64},   {3, 128}, {17, 576},
                                                              {2, 1032}, {3, 1033}, {4, 8192}};
    for (int i = 0; i < 5; ++i) shapes.emplace_back(integer(1, 40), integer(1, 3000));
    for (const auto& [rows, columns] : shapes) {
        SCOPED_TRACE(columns);
        const std::vector<float> x = activations(rows * columns, 3.0F);
        const std::vector<float> weight = normal(columns);
        std::vector<std::vector<float>> results;
        for (Backend* backend : std::initializer_list<Backend*>{&cpu(), &cuda()}) {
            const DType type = backend->activation_dtype();
            Tensor out = poisoned(*backend, {rows, columns}, type);
            backend->rms_norm(put(*backend, x, {rows, columns}, type), put(*backend, weight, {columns}),
                              1e-5F, out);
            results.push_back(get_floats(out));
        }
        expect_near(results[1], results[0], [&](std::size_t i) {
            return (kBf16Unit + (columns + 8) * kFp32Unit) * std::abs(results[0][i]);
        });
    }
}

TEST_F(Forward, linear) {
    std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>> shapes{
        {1, 8, 1}, {5, 7, 3}, {33, 100, 65}, {128, 576, 192}, {77, 1536, 576}, {513, 2048, 264}};
    for (int i = 0; i < 6; ++i) shapes.emplace_back(integer(1, 300), integer(1, 900), integer(1, 300));
    for (const auto& [tokens, columns, outputs] : shapes) {
        SCOPED_TRACE(::testing::Message() << tokens << " x " << columns << " x " << outputs);
        const std::vector<float> x = activations(tokens * columns);
        const std::vector<float> w = activations(outputs * columns);
        const std::vector<float> bias = activations(outputs, 10.0F);
        const auto on_cpu = [&](const std::vector<float>& left, const std::vector<float>& right,
                                bool biased) {
            Tensor out = poisoned(cpu(), {tokens, outputs}, DType::f32);
            const Tensor b = put(cpu(), bias, {outputs});
            cpu().linear(put(cpu(), left, {tokens, columns}), put(cpu(), right, {outputs, columns}),
                         biased ? ConstTensorView(b) : ConstTensorView(), out);
            return get<float>(out);
        };
        const std::vector<float> magnitude = on_cpu(absolute(x), absolute(w), false);
        const Tensor b = put(cuda(), bias, {outputs});
        for (const DType type : {DType::f32, DType::bf16}) {
            for (const bool biased : {false, true}) {
                const std::vector<float> expected = on_cpu(x, w, biased);
                Tensor out = poisoned(cuda(), {tokens, outputs}, type);
                cuda().linear(put(cuda(), x, {tokens, columns}, DType::bf16),
                              put(cuda(), w, {outputs, columns}, DType::bf16),
                              biased ? ConstTensorView(b) : ConstTensorView(), out);
                // Tensor cores cut sums off instead of rounding them, hence 2 units a step; a biased
                // bf16 output is rounded before and after the bias.
                const double rounding = type == DType::bf16 ? kBf16Unit : 0.0;
                expect_near(get_floats(out), expected, [&](std::size_t i) {
                    const double sum = (2.0 * columns + 4) * kFp32Unit * magnitude[i];
                    const double before = biased ? std::abs(expected[i] - bias[i % outputs]) : 0.0;
                    return 1.01 * (sum + rounding * (std::abs(expected[i]) + before)) +
                           4 * kFp32Unit * std::abs(expected[i]);
                });
            }
        }
    }
}

TEST_F(Forward, linear_gives_a_row_the_same_bits_in_any_company) {
    const std::int64_t columns = 576;
    const std::int64_t outputs = 192;
    const Tensor x = put(cuda(), activations(1000 * columns), {1000, columns}, DType::bf16);
    const Tensor w = put(cuda(), activations(outputs * columns), {outputs, columns}, DType::bf16);
    Tensor all = cuda().empty({1000, outputs}, DType::f32, "test");
    cuda().linear(x, w, {}, all);
    for (const auto& [begin, end] : {std::pair{0, 1}, {3, 11}, {100, 613}, {999, 1000}}) {
        Tensor some = cuda().empty({end - begin, outputs}, DType::f32, "test");
        cuda().linear(ConstTensorView(x).rows(begin, end), w, {}, some);
        EXPECT_EQ(get<float>(some), get<float>(ConstTensorView(all).rows(begin, end)));
    }
}

TEST_F(Forward, add_and_silu_mul) {
    for (const std::int64_t count : {1, 8, 1003, 4096}) {
        const std::vector<float> a = activations(count, 4.0F);
        const std::vector<float> b = activations(count);
        const Tensor left = put(cuda(), a, {count}, DType::bf16);
        Tensor sum = put(cuda(), b, {count}, DType::bf16);
        cuda().add(left, sum);
        Tensor product = poisoned(cuda(), {count}, DType::bf16);
        cuda().silu_mul(left, put(cuda(), b, {count}, DType::bf16), product);
        const std::vector<float> sums = get_floats(sum);
        std::vector<float> expected(a.size());
        for (std::size_t i = 0; i < a.size(); ++i) {
            ASSERT_EQ(sums[i], to_float(to_bfloat16(a[i] + b[i])));
            expected[i] = static_cast<float>(a[i] / (1.0 + std::exp(-double{a[i]})) * b[i]);
        }
        expect_near(get_floats(product), expected,
                    [&](std::size_t i) { return 1.01 * kBf16Unit * std::abs(expected[i]) + 1e-30; });
    }
}

TEST_F(Forward, rope) {
    const Sequences sequences{{0, 5, 5, 17, 18}};
    for (const std::int64_t half : {1, 5, 8, 32, 64}) {
        const std::vector<float> x = activations(18 * 3 * 2 * half);
        std::vector<float> table(2 * 20 * half);
        for (std::int64_t i = 0; i < 20 * half; ++i) {
            table[i] = std::cos(0.1F * static_cast<float>(i));
            table[20 * half + i] = std::sin(0.1F * static_cast<float>(i));
        }
        Tensor a = put(cpu(), x, {18, 3, 2 * half});
        Tensor b = put(cuda(), x, {18, 3, 2 * half}, DType::bf16);
        cpu().rope(a, sequences, put(cpu(), table, {2, 20, half}));
        cuda().rope(b, sequences, put(cuda(), table, {2, 20, half}));
        const std::vector<float> expected = get<float>(a);
        expect_near(get_floats(b), expected,
                    [&](std::size_t i) { return kBf16Unit * std::abs(expected[i]) + 4 * kFp32Unit * 8.0; });
    }
}

struct Heads {
    std::int64_t heads, kv_heads, width, window;
};

TEST_F(Forward, attention) {
    const Sequences sequences{{0, 1, 1, 70, 199, 500}};
    const std::int64_t tokens = sequences.tokens();
    for (const Heads& h : {Heads{4, 4, 16, 0},
                           {6, 2, 64, 0},
                           {2, 1, 80, 0},
                           {3, 3, 96, 0},
                           {8, 1, 128, 0},
                           {2, 2, 256, 0},
                           {4, 2, 72, 0},
                           {4, 2, 64, 1},
                           {4, 2, 128, 50},
                           {2, 1, 256, 200}}) {
        SCOPED_TRACE(::testing::Message()
                     << h.heads << "/" << h.kv_heads << " heads of " << h.width << ", window " << h.window);
        const std::vector<float> q = activations(tokens * h.heads * h.width, 2.0F);
        const std::vector<float> k = activations(tokens * h.kv_heads * h.width);
        const std::vector<float> v = activations(tokens * h.kv_heads * h.width);
        const AttentionOptions options{1.0F / std::sqrt(static_cast<float>(h.width)), h.window};
        const auto run = [&](Backend& backend, const std::vector<float>& values) {
            const DType type = backend.activation_dtype();
            Tensor out = poisoned(backend, {tokens, h.heads, h.width}, type);
            backend.attention(put(backend, q, {tokens, h.heads, h.width}, type),
                              put(backend, k, {tokens, h.kv_heads, h.width}, type),
                              put(backend, values, {tokens, h.kv_heads, h.width}, type), sequences, options,
                              out);
            return get_floats(out);
        };
        const std::vector<float> expected = run(cpu(), v);
        const std::vector<float> magnitude = run(cpu(), absolute(v));
        // Probabilities are rounded to bf16 before they meet the values, and the result once more.
        // Scores reach about 12, so fp32 sums of D products move a probability by far less than that.
        expect_near(run(cuda(), v), expected,
                    [&](std::size_t i) { return kBf16Unit * (1.02 * magnitude[i] + std::abs(expected[i])); });
    }
}

TEST_F(Forward, attention_refuses_heads_it_has_no_kernel_for) {
    const Sequences sequences{{0, 2}};
    const Tensor x = put(cuda(), activations(2 * 12), {2, 1, 12}, DType::bf16);
    Tensor out = cuda().empty({2, 1, 12}, DType::bf16, "test");
    EXPECT_THROW(cuda().attention(x, x, x, sequences, {}, out), InternalError);
}

TEST_F(Forward, cross_entropy) {
    const std::vector<float> logits = normal(7 * 3001, 5.0F);
    const std::vector<std::int32_t> targets{0, 3000, 17, 5, 5, 1234, 2999};
    const auto expected = cpu().cross_entropy(put(cpu(), logits, {7, 3001}), targets);
    const auto actual = cuda().cross_entropy(put(cuda(), logits, {7, 3001}), targets);
    for (std::size_t i = 0; i < targets.size(); ++i) EXPECT_NEAR(actual[i], expected[i], 1e-9);
}

TEST_F(Forward, logit_distances) {
    const std::vector<float> reference = normal(7 * 3001, 5.0F);
    std::vector<float> logits = normal(7 * 3001, 5.0F);
    std::copy_n(reference.begin(), 3001, logits.begin());
    const auto expected =
        cpu().logit_distances(put(cpu(), reference, {7, 3001}), put(cpu(), logits, {7, 3001}));
    const auto actual =
        cuda().logit_distances(put(cuda(), reference, {7, 3001}), put(cuda(), logits, {7, 3001}));
    for (std::size_t i = 0; i < expected.size(); ++i) {
        EXPECT_NEAR(actual[i].divergence, expected[i].divergence, 1e-9);
        EXPECT_EQ(actual[i].same_top, expected[i].same_top);
    }
}

TEST_F(Forward, columns) {
    const std::vector<float> x = normal(6 * 300);
    std::vector<std::int32_t> order(300);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    Tensor out = poisoned(cuda(), {6, 300}, DType::f32);
    cuda().permute_columns(put(cuda(), x, {6, 300}), order, out);
    std::vector<float> permuted = get<float>(out);
    for (std::size_t i = 0; i < permuted.size(); ++i) {
        ASSERT_EQ(permuted[i], x[i / 300 * 300 + static_cast<std::size_t>(order[i % 300])]);
    }
    const std::vector<std::int32_t> dead{0, 299, 41};
    cuda().zero_columns(dead, out);
    for (std::size_t i = 0; i < permuted.size(); ++i) {
        const auto column = static_cast<std::int32_t>(i % 300);
        if (std::find(dead.begin(), dead.end(), column) != dead.end()) permuted[i] = 0.0F;
    }
    EXPECT_EQ(get<float>(out), permuted);

    const auto distances = cuda().squared_distance(put(cuda(), x, {6, 300}), out);
    const auto expected = cpu().squared_distance(put(cpu(), x, {6, 300}), put(cpu(), permuted, {6, 300}));
    for (std::size_t i = 0; i < 6; ++i) EXPECT_NEAR(distances[i], expected[i], 1e-12 * expected[i]);

    std::vector<std::uint8_t> bytes(6 * 300);
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(integer(0, 255));
    Tensor byte_out = poisoned(cuda(), {6, 300}, DType::u8);
    cuda().permute_columns(put(cuda(), bytes, {6, 300}), order, byte_out);
    const auto permuted_bytes = get<std::uint8_t>(byte_out);
    for (std::size_t i = 0; i < bytes.size(); ++i) {
        ASSERT_EQ(permuted_bytes[i], bytes[i / 300 * 300 + static_cast<std::size_t>(order[i % 300])]);
    }
}

TEST_F(Forward, pack_and_unpack) {
    for (int bits = 1; bits <= 8; ++bits) {
        for (const auto& [rows, columns] : {std::pair{1, 32}, {5, 96}, {300, 1024}}) {
            SCOPED_TRACE(::testing::Message() << bits << " bits, " << rows << " x " << columns);
            std::vector<std::uint8_t> codes(rows * columns);
            for (auto& code : codes) code = static_cast<std::uint8_t>(integer(0, (1 << bits) - 1));
            const Shape shape{columns * bits / 32, rows};
            Tensor a = poisoned(cpu(), shape, DType::i32);
            Tensor b = poisoned(cuda(), shape, DType::i32);
            cpu().pack(put(cpu(), codes, {rows, columns}), bits, a);
            cuda().pack(put(cuda(), codes, {rows, columns}), bits, b);
            EXPECT_EQ(get<std::int32_t>(a), get<std::int32_t>(b));
            Tensor back = poisoned(cuda(), {rows, columns}, DType::u8);
            cuda().unpack(b, bits, back);
            EXPECT_EQ(get<std::uint8_t>(back), codes);
        }
    }
}

TEST_F(Forward, dequantize) {
    const std::int64_t rows = 7;
    const std::int64_t columns = 200;
    std::vector<std::uint8_t> codes(rows * columns);
    for (auto& code : codes) code = static_cast<std::uint8_t>(integer(0, 15));
    const std::vector<float> scales = normal(rows * 4, 0.01F);
    std::vector<std::uint8_t> zeros(rows * 4);
    for (auto& zero : zeros) zero = static_cast<std::uint8_t>(integer(0, 15));
    std::vector<std::int32_t> g_idx(columns);
    for (auto& group : g_idx) group = static_cast<std::int32_t>(integer(0, 3));
    std::vector<std::vector<float>> results;
    for (Backend* backend : std::initializer_list<Backend*>{&cpu(), &cuda()}) {
        const Tensor c = put(*backend, codes, {rows, columns});
        const Tensor s = put(*backend, scales, {rows, 4}, DType::f16);
        const Tensor z = put(*backend, zeros, {rows, 4});
        Tensor out = poisoned(*backend, {rows, columns}, DType::f32);
        backend->dequantize({c, s, z}, g_idx, out);
        results.push_back(get<float>(out));
        if (backend == &cpu()) continue;
        Tensor rounded = poisoned(*backend, {rows, columns}, DType::bf16);
        backend->dequantize({c, s, z}, g_idx, rounded);
        std::vector<float> expected = results[0];
        for (float& value : expected) value = to_float(to_bfloat16(value));
        EXPECT_EQ(get_floats(rounded), expected);
    }
    EXPECT_EQ(results[1], results[0]);
}

}  // namespace
}  // namespace quantmill::testing
