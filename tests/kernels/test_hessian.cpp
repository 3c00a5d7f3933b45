#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/kernels/backend_test.h"

namespace quantmill::testing {
namespace {

class Hessian : public BackendTest {
protected:
    std::vector<float> accumulate(const std::vector<float>& x, std::int64_t tokens, std::int64_t order,
                                  const std::vector<float>& start) {
        Tensor h = upload(start, {order, order});
        backend().accumulate_hessian(upload_activation(x, {tokens, order}), h);
        return download<float>(h);
    }

    void check(std::int64_t tokens, std::int64_t order) {
        SCOPED_TRACE(::testing::Message() << "T=" << tokens << " C=" << order);
        const auto x = normal(tokens * order);
        const auto start = normal(order * order);
        const auto h = accumulate(x, tokens, order, start);
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) {
                double sum = start[i * order + j];
                double magnitude = std::abs(sum);
                for (std::int64_t t = 0; t < tokens; ++t) {
                    const double term = double{x[t * order + i]} * double{x[t * order + j]};
                    sum += term;
                    magnitude += std::abs(term);
                }
                ASSERT_NEAR(h[i * order + j], sum, 2e-6 * magnitude) << i << ", " << j;
            }
        }
    }

    // A lower triangle with values of very different size, as outlier channels give.
    std::vector<float> wide_range(std::int64_t order) {
        auto h = normal(order * order);
        for (float& value : h) value = std::ldexp(value, static_cast<int>(integer(-20, 20)));
        return h;
    }
};

TEST_P(Hessian, AccumulatesTheLowerTriangle) {
    SCOPED_TRACE(trace());
    check(1, 1);
    check(1, 300);
    check(700, 1);
    check(300, 257);  // one more than a tile
    check(33, 600);
    for (int i = 0; i < 5; ++i) check(integer(1, 300), integer(1, 300));
}

TEST_P(Hessian, IntegersSumExactlyInAnyChunks) {
    SCOPED_TRACE(trace());
    constexpr std::int64_t kTokens = 500;
    constexpr std::int64_t kOrder = 130;
    std::vector<float> x(kTokens * kOrder);
    for (float& value : x) value = static_cast<float>(integer(-8, 8));
    const std::vector<float> zeros(kOrder * kOrder, 0.0F);
    const auto whole = accumulate(x, kTokens, kOrder, zeros);
    Tensor h = upload(zeros, {kOrder, kOrder});
    Tensor tokens = upload_activation(x, {kTokens, kOrder});
    for (const std::int64_t end : {1, 200, 201, 500}) {
        const std::int64_t begin = end == 1 ? 0 : end == 200 ? 1 : end == 201 ? 200 : 201;
        backend().accumulate_hessian(tokens.view().rows(begin, end), h);
    }
    const auto pieces = download<float>(h);
    for (std::int64_t i = 0; i < kOrder; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) {
            ASSERT_EQ(pieces[i * kOrder + j], whole[i * kOrder + j]);
        }
    }
}

TEST_P(Hessian, ThreadsDoNotChangeABit) {
    SCOPED_TRACE(trace());
    const auto x = normal(std::int64_t{450} * 700);
    const std::vector<float> zeros(std::size_t{700} * 700, 0.0F);
    expect_same_with_any_threads([&] { return accumulate(x, 450, 700, zeros); });
}

TEST_P(Hessian, DiagonalIsReadAndWritten) {
    SCOPED_TRACE(trace());
    auto h = normal(25);
    Tensor tensor = upload(h, {5, 5});
    EXPECT_EQ(backend().read_diagonal(tensor), (std::vector<float>{h[0], h[6], h[12], h[18], h[24]}));
    backend().write_diagonal(std::vector<float>{1, 2, 3, 4, 5}, tensor);
    for (int i = 0; i < 5; ++i) h[i * 6] = static_cast<float>(i + 1);
    EXPECT_EQ(download<float>(tensor), h);
    EXPECT_THROW(backend().write_diagonal(std::vector<float>{1, 2}, tensor), InternalError);
}

TEST_P(Hessian, FixedPointSumsRoundEachAddendAndKeepTheRest) {
    SCOPED_TRACE(trace());
    for (const std::int64_t order : {1, 2, 77}) {
        const std::vector<std::vector<float>> addends{wide_range(order), wide_range(order)};
        std::vector<std::int32_t> exponents(static_cast<std::size_t>(order));
        for (auto& exponent : exponents) exponent = static_cast<std::int32_t>(integer(-5, 9));
        const std::int64_t count = order * (order + 1) / 2;
        Tensor sum = upload(std::vector<std::int64_t>(static_cast<std::size_t>(count), 3), {count});
        for (const auto& addend : addends) {
            backend().add_fixed_point(upload(addend, {order, order}), exponents, sum);
        }
        Tensor h = upload(std::vector<float>(static_cast<std::size_t>(order * order), 7.0F), {order, order});
        backend().from_fixed_point(sum, exponents, 0.375, h);
        const auto totals = download<std::int64_t>(sum);
        const auto back = download<float>(h);
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) {
                const int exponent = exponents[i] + exponents[j];
                std::int64_t expected = 3;
                for (const auto& addend : addends) {
                    expected += std::llrint(std::ldexp(double{addend[i * order + j]}, exponent));
                }
                ASSERT_EQ(totals[i * (i + 1) / 2 + j], expected);
                const double value = 0.375 * std::ldexp(static_cast<double>(expected), -exponent);
                ASSERT_EQ(back[i * order + j], static_cast<float>(value));
            }
            for (std::int64_t j = i + 1; j < order; ++j) ASSERT_EQ(back[i * order + j], 7.0F);
        }
    }
}

TEST_P(Hessian, FixedPointRefusesWhatItCannotHold) {
    Tensor sum = upload<std::int64_t>({0, 0, 0}, {3});
    const std::vector<std::int32_t> exponents{30, 30};
    for (const float bad : {NAN, INFINITY, 1e12F}) {
        Tensor h = upload<float>({1.0F, 0.0F, bad, 1.0F}, {2, 2});
        EXPECT_THROW(backend().add_fixed_point(h, exponents, sum), InternalError) << bad;
    }
    Tensor upper = upload<float>({1.0F, NAN, 1.0F, 1.0F}, {2, 2});  // not part of the triangle
    EXPECT_NO_THROW(backend().add_fixed_point(upper, exponents, sum));
}

TEST_P(Hessian, PermutesRowsAndColumns) {
    SCOPED_TRACE(trace());
    for (const std::int64_t order : {1, 2, 50}) {
        const auto source = normal(order * order);
        const auto p = permutation(order);
        Tensor h = upload(std::vector<float>(source.size(), 0.0F), {order, order});
        backend().permute_symmetric(upload(source, {order, order}), p, h);
        const auto result = download<float>(h);
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) {
                ASSERT_EQ(result[i * order + j], source[std::max(p[i], p[j]) * order + std::min(p[i], p[j])]);
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Backends, Hessian, ::testing::ValuesIn(built_backends()), backend_name);

}  // namespace
}  // namespace quantmill::testing
