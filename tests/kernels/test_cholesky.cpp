#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/kernels/backend_test.h"

namespace quantmill::testing {
namespace {

class ReverseCholesky : public BackendTest {
protected:
    // AᵀA / n + diagonal, as a full matrix of floats.
    std::vector<float> positive_definite(std::int64_t order, double diagonal) {
        const auto a = normal(order * order);
        std::vector<float> h(a.size());
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) {
                double sum = i == j ? diagonal : 0.0;
                for (std::int64_t t = 0; t < order; ++t) {
                    sum += double{a[t * order + i]} * double{a[t * order + j]} / static_cast<double>(order);
                }
                h[i * order + j] = h[j * order + i] = static_cast<float>(sum);
            }
        }
        return h;
    }

    bool factor(const std::vector<float>& h, std::int64_t order, std::vector<float>& result) {
        std::vector<float> lower = h;
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = i + 1; j < order; ++j) lower[i * order + j] = NAN;  // not an input
        }
        Tensor tensor = upload(lower, {order, order});
        const bool positive = backend().reverse_cholesky(tensor);
        result = download<float>(tensor);
        return positive;
    }

    bool succeeds(const std::vector<float>& h, std::int64_t order) {
        std::vector<float> ignored;
        return factor(h, order, ignored);
    }
};

// R·Rᵀ = H entry by entry, R taken from the documented form.
TEST_P(ReverseCholesky, MultipliesBackToTheMatrix) {
    SCOPED_TRACE(trace());
    for (const std::int64_t order : {1, 2, 3, 100, 127, 128, 129, 300, 513}) {
        SCOPED_TRACE(order);
        const auto h = positive_definite(order, 0.05);
        std::vector<float> f;
        ASSERT_TRUE(factor(h, order, f));
        const auto r = [&](std::int64_t i, std::int64_t j) {
            const double diagonal = f[j * order + j];
            return i == j ? diagonal : double{f[i * order + j]} * diagonal;
        };
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) {
                double product = 0.0;
                for (std::int64_t k = i; k < order; ++k) product += r(i, k) * r(j, k);
                ASSERT_NEAR(product, h[i * order + j], 4e-6) << i << ", " << j;
            }
        }
    }
}

TEST_P(ReverseCholesky, RefusesMatricesThatAreNotPositiveDefinite) {
    SCOPED_TRACE(trace());
    EXPECT_FALSE(succeeds({0.0F}, 1));
    EXPECT_FALSE(succeeds({-1.0F}, 1));
    EXPECT_FALSE(succeeds({1.0F, 2.0F, 2.0F, 1.0F}, 2));
    constexpr std::int64_t kOrder = 300;
    const auto good = positive_definite(kOrder, 0.05);
    ASSERT_TRUE(succeeds(good, kOrder));
    for (const std::int64_t at : {0, 5, 130, 299}) {
        auto negative = good;
        negative[at * kOrder + at] = -0.5F;
        EXPECT_FALSE(succeeds(negative, kOrder)) << at;
        for (const float bad : {NAN, INFINITY}) {
            auto broken = good;
            broken[at * kOrder + at] = bad;
            EXPECT_FALSE(succeeds(broken, kOrder)) << at << " " << bad;
            broken = good;
            broken[at * kOrder + at / 2] = bad;
            EXPECT_FALSE(succeeds(broken, kOrder)) << at << " " << bad;
        }
    }
}

TEST_P(ReverseCholesky, ThreadsDoNotChangeABit) {
    SCOPED_TRACE(trace());
    constexpr std::int64_t kOrder = 700;
    const auto h = positive_definite(kOrder, 0.05);
    expect_same_with_any_threads([&] {
        std::vector<float> f;
        EXPECT_TRUE(factor(h, kOrder, f));
        for (std::int64_t i = 0; i < kOrder; ++i) {
            for (std::int64_t j = 0; j < i; ++j) f[i * kOrder + j] = 0.0F;  // undefined
        }
        return f;
    });
}

TEST_P(ReverseCholesky, RefusesShapesThatDoNotFit) {
    Tensor h = upload(normal(6), {2, 3});
    EXPECT_THROW(static_cast<void>(backend().reverse_cholesky(h)), InternalError);
}

INSTANTIATE_TEST_SUITE_P(Backends, ReverseCholesky, ::testing::ValuesIn(built_backends()), backend_name);

}  // namespace
}  // namespace quantmill::testing
