#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "tests/kernels/backend_test.h"

namespace quantmill::testing {
namespace {

using Matrix = std::vector<double>;

// Solves x·H = y for one row in double precision, H = L·Lᵀ positive definite.
Matrix solve_row(const Matrix& lower, std::int64_t n, Matrix y) {
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t k = 0; k < i; ++k) y[i] -= lower[i * n + k] * y[k];
        y[i] /= lower[i * n + i];
    }
    for (std::int64_t i = n - 1; i >= 0; --i) {
        for (std::int64_t k = i + 1; k < n; ++k) y[i] -= lower[k * n + i] * y[k];
        y[i] /= lower[i * n + i];
    }
    return y;
}

Matrix cholesky(Matrix h, std::int64_t n) {
    for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t i = j; i < n; ++i) {
            double sum = h[i * n + j];
            for (std::int64_t k = 0; k < j; ++k) sum -= h[i * n + k] * h[j * n + k];
            h[i * n + j] = i == j ? std::sqrt(sum) : sum / h[j * n + j];
        }
    }
    return h;
}

class ErrorPropagation : public BackendTest {
protected:
    struct Cross {
        std::vector<float> difference, d;
    };
    Cross accumulate(const std::vector<float>& original, const std::vector<float>& x, std::int64_t tokens,
                     std::int64_t order, const std::vector<float>& start) {
        Tensor d = upload(start, {order, order});
        Tensor difference = upload_activation(original, {tokens, order});
        backend().accumulate_cross(difference, upload_activation(x, {tokens, order}), d);
        return {download_activation(difference), download<float>(d)};
    }

    void check_cross(std::int64_t tokens, std::int64_t order) {
        SCOPED_TRACE(::testing::Message() << "T=" << tokens << " C=" << order);
        const auto x = normal(tokens * order);
        auto original = normal(tokens * order, 0.1);
        for (std::size_t i = 0; i < x.size(); ++i) original[i] += x[i];
        original = download_activation(upload_activation(original, {tokens, order}));
        const auto start = normal(order * order);
        const Cross result = accumulate(original, x, tokens, order, start);
        // Half a unit in the last place of a bf16 difference.
        const double rounding = backend().activation_dtype() == DType::bf16 ? 0x1p-8 : 0x1p-24;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double difference = double{original[i]} - double{x[i]};
            ASSERT_NEAR(result.difference[i], difference, rounding * std::abs(difference));
        }
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = 0; j < order; ++j) {
                double sum = start[i * order + j];
                double terms = 0.0;
                for (std::int64_t t = 0; t < tokens; ++t) {
                    const double difference = double{original[t * order + i]} - double{x[t * order + i]};
                    sum += difference * double{x[t * order + j]};
                    terms += std::abs(difference * double{x[t * order + j]});
                }
                const double magnitude = terms + std::abs(double{start[i * order + j]});
                ASSERT_NEAR(result.d[i * order + j], sum, 2e-6 * magnitude + rounding * terms)
                    << i << ", " << j;
            }
        }
    }

    // A Hessian of outlier channels and few tokens, damped by `damp` of its mean diagonal: its condition
    // number is about order / damp times the spread of its columns.
    Matrix hessian(std::int64_t order, double damp) {
        const std::int64_t tokens = order / 2 + 1;
        auto x = normal(tokens * order);
        for (std::int64_t j = 0; j < order; ++j) {
            const double loudness = std::exp(0.5 * normal(1)[0]);
            for (std::int64_t t = 0; t < tokens; ++t) x[t * order + j] *= static_cast<float>(loudness);
        }
        Matrix h(static_cast<std::size_t>(order * order));
        double mean = 0.0;
        for (std::int64_t i = 0; i < order; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) {
                double sum = 0.0;
                for (std::int64_t t = 0; t < tokens; ++t) sum += double{x[t * order + i]} * x[t * order + j];
                h[i * order + j] = h[j * order + i] = 2.0 / static_cast<double>(tokens) * sum;
            }
            mean += h[i * order + i] / static_cast<double>(order);
        }
        for (std::int64_t i = 0; i < order; ++i) h[i * order + i] += damp * mean;
        for (double& value : h) value = static_cast<float>(value);  // what the factorization gets
        return h;
    }

    Tensor factor(const Matrix& h, const std::vector<std::int32_t>& order) {
        const auto n = static_cast<std::int64_t>(order.size());
        std::vector<float> ordered(h.size());
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t j = 0; j < n; ++j) {
                ordered[i * n + j] = static_cast<float>(h[order[i] * n + order[j]]);
            }
        }
        Tensor factor = upload(ordered, {n, n});
        EXPECT_TRUE(backend().reverse_cholesky(factor));
        return factor;
    }

    std::vector<float> propagate(const std::vector<float>& weights, std::int64_t rows, const Tensor& d,
                                 const Tensor& factor, std::span<const std::int32_t> order, float alpha) {
        const std::int64_t columns = d.shape()[0];
        Tensor target = upload(std::vector<float>(weights.size(), NAN), {rows, columns});
        backend().propagate_error(upload(weights, {rows, columns}), d, factor, order, alpha, target);
        return download<float>(target);
    }

    // The matrix that a factor stands for: what the factorization rounds is not judged here.
    static Matrix product_of(const std::vector<float>& factor, const std::vector<std::int32_t>& order) {
        const std::size_t n = order.size();
        const auto r = [&](std::size_t i, std::size_t j) {
            return i == j ? double{factor[j * n + j]} : double{factor[i * n + j]} * factor[j * n + j];
        };
        Matrix h(n * n);
        for (std::size_t i = 0; i < n; ++i) {
            for (std::size_t j = 0; j <= i; ++j) {
                double sum = 0.0;
                for (std::size_t k = i; k < n; ++k) sum += r(i, k) * r(j, k);
                const auto a = static_cast<std::size_t>(order[i]);
                const auto b = static_cast<std::size_t>(order[j]);
                h[a * n + b] = h[b * n + a] = sum;
            }
        }
        return h;
    }

    void check_target(std::int64_t rows, std::int64_t columns, bool ordered, double damp) {
        SCOPED_TRACE(::testing::Message() << "R=" << rows << " C=" << columns << " damp=" << damp);
        Matrix h = hessian(columns, damp);
        std::vector<std::int32_t> order = permutation(columns);
        if (!ordered) std::iota(order.begin(), order.end(), 0);
        const auto weights = normal(rows * columns);
        const auto cross = normal(columns * columns, 0.05);
        const float alpha = 0.75F;
        const Tensor factored = factor(h, order);
        h = product_of(download<float>(factored), order);
        const auto target = propagate(
            weights, rows, upload(cross, {columns, columns}), factored,
            ordered ? std::span<const std::int32_t>(order) : std::span<const std::int32_t>{}, alpha);
        const Matrix lower = cholesky(h, columns);
        for (std::int64_t r = 0; r < rows; ++r) {
            Matrix product(static_cast<std::size_t>(columns));
            for (std::int64_t k = 0; k < columns; ++k) {
                for (std::int64_t j = 0; j < columns; ++j) {
                    product[j] += double{weights[r * columns + k]} * double{cross[k * columns + j]};
                }
            }
            const Matrix moved = solve_row(lower, columns, product);
            // In the norm of H, which is what a change of the weights does to the outputs.
            double error = 0.0, size = 0.0;
            for (std::int64_t i = 0; i < columns; ++i) {
                for (std::int64_t j = 0; j < columns; ++j) {
                    const auto miss = [&](std::int64_t c) {
                        return target[r * columns + c] -
                               (double{weights[r * columns + c]} + alpha * moved[c]);
                    };
                    error += miss(i) * h[i * columns + j] * miss(j);
                    size += moved[i] * h[i * columns + j] * moved[j];
                }
            }
            ASSERT_LE(std::sqrt(error), 1e-4 * std::sqrt(size)) << "row " << r;
        }
    }
};

TEST_P(ErrorPropagation, AccumulatesTheDifferenceTimesTheInput) {
    SCOPED_TRACE(trace());
    check_cross(1, 1);
    check_cross(1, 300);
    check_cross(700, 1);
    check_cross(90, 289);  // one more than a tile
    check_cross(33, 600);
    for (int i = 0; i < 5; ++i) check_cross(integer(1, 200), integer(1, 200));
}

TEST_P(ErrorPropagation, SmallIntegersSumExactly) {
    SCOPED_TRACE(trace());
    constexpr std::int64_t kTokens = 300, kOrder = 130;
    std::vector<float> original(kTokens * kOrder), x(kTokens * kOrder);
    for (float& value : original) value = static_cast<float>(integer(-60, 60));
    for (float& value : x) value = static_cast<float>(integer(-60, 60));
    const Cross result = accumulate(original, x, kTokens, kOrder, std::vector<float>(kOrder * kOrder, 0.0F));
    for (std::int64_t i = 0; i < kOrder; ++i) {
        for (std::int64_t j = 0; j < kOrder; ++j) {
            float sum = 0.0F;
            for (std::int64_t t = 0; t < kTokens; ++t) {
                sum += (original[t * kOrder + i] - x[t * kOrder + i]) * x[t * kOrder + j];
            }
            ASSERT_EQ(result.d[i * kOrder + j], sum) << i << ", " << j;
        }
    }
}

TEST_P(ErrorPropagation, FixedPointHoldsAllElements) {
    SCOPED_TRACE(trace());
    for (const std::int64_t order : {1, 2, 77}) {
        std::vector<std::vector<float>> addends{normal(order * order), normal(order * order)};
        for (auto& addend : addends) {
            for (float& value : addend) value = std::ldexp(value, static_cast<int>(integer(-20, 20)));
        }
        std::vector<std::int32_t> exponents(static_cast<std::size_t>(order));
        for (auto& exponent : exponents) exponent = static_cast<std::int32_t>(integer(-5, 9));
        Tensor sum =
            upload(std::vector<std::int64_t>(static_cast<std::size_t>(order * order), 3), {order, order});
        for (const auto& addend : addends) {
            Tensor d = upload(addend, {order, order});
            double largest = 0.0;
            for (std::int64_t i = 0; i < order; ++i) {
                for (std::int64_t j = 0; j < order; ++j) {
                    largest = std::max(largest, std::ldexp(std::abs(double{addend[i * order + j]}),
                                                           exponents[i] + exponents[j]));
                }
            }
            EXPECT_EQ(backend().largest_fixed_point(d, exponents), largest);
            backend().add_fixed_point_full(d, exponents, sum);
        }
        Tensor d = upload(std::vector<float>(static_cast<std::size_t>(order * order), 7.0F), {order, order});
        backend().from_fixed_point_full(sum, exponents, 0.375, d);
        const auto totals = download<std::int64_t>(sum);
        const auto back = download<float>(d);
        for (std::int64_t at = 0; at < order * order; ++at) {
            const int exponent = exponents[at / order] + exponents[at % order];
            std::int64_t expected = 3;
            for (const auto& addend : addends)
                expected += std::llrint(std::ldexp(double{addend[at]}, exponent));
            ASSERT_EQ(totals[at], expected);
            ASSERT_EQ(back[at],
                      static_cast<float>(0.375 * std::ldexp(static_cast<double>(expected), -exponent)));
        }
    }
}

TEST_P(ErrorPropagation, FixedPointRefusesWhatItCannotHold) {
    Tensor sum = upload<std::int64_t>({0, 0, 0, 0}, {2, 2});
    const std::vector<std::int32_t> exponents{30, 30};
    for (const float bad : {NAN, INFINITY, -INFINITY, 1e12F}) {
        for (const std::size_t place : {0U, 1U, 2U}) {
            std::vector<float> values{1.0F, 0.0F, 0.0F, 1.0F};
            values[place] = bad;
            Tensor d = upload(values, {2, 2});
            EXPECT_GT(backend().largest_fixed_point(d, exponents), 0x1p62) << bad;
            EXPECT_THROW(backend().add_fixed_point_full(d, exponents, sum), InternalError) << bad;
        }
    }
}

TEST_P(ErrorPropagation, TargetIsThatOfTheFormula) {
    SCOPED_TRACE(trace());
    check_target(1, 1, false, 0.05);
    check_target(3, 7, true, 0.05);
    check_target(65, 128, false, 0.05);
    check_target(10, 129, true, 0.05);
    check_target(5, 300, true, 0.001);
    check_target(2, 1100, false, 0.05);  // more than a panel of columns
    for (int i = 0; i < 3; ++i) check_target(integer(1, 70), integer(1, 200), i % 2 == 0, 0.02);
}

// As wide as GPUs multiply in bf16 parts; the factor is made up, so that the reference takes no
// factorization.
TEST_P(ErrorPropagation, TargetOfWideMatrices) {
    SCOPED_TRACE(trace());
    const std::int64_t rows = 3, n = 2300;
    auto stored = normal(n * n, 0.02);
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < i; ++j) stored[i * n + j] = NAN;  // undefined after a factorization
        stored[i * n + i] = std::exp(0.5F * normal(1)[0]);
    }
    const auto weights = normal(rows * n), cross = normal(n * n, 0.05);
    const auto target = propagate(weights, rows, upload(cross, {n, n}), upload(stored, {n, n}), {}, 1.0F);
    // Row vectors times R, and over Rᵀ and R.
    const auto r = [&](std::int64_t i, std::int64_t j) {
        return i == j ? double{stored[j * n + j]} : double{stored[i * n + j]} * stored[j * n + j];
    };
    const auto times = [&](const Matrix& x) {
        Matrix y(x.size());
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t j = i; j < n; ++j) y[j] += x[i] * r(i, j);
        }
        return y;
    };
    for (std::int64_t row = 0; row < rows; ++row) {
        Matrix moved(static_cast<std::size_t>(n));
        for (std::int64_t k = 0; k < n; ++k) {
            for (std::int64_t j = 0; j < n; ++j) {
                moved[j] += double{weights[row * n + k]} * double{cross[k * n + j]};
            }
        }
        for (std::int64_t i = n - 1; i >= 0; --i) {
            for (std::int64_t j = i + 1; j < n; ++j) moved[i] -= moved[j] * r(i, j);
            moved[i] /= r(i, i);
        }
        for (std::int64_t i = 0; i < n; ++i) {
            moved[i] /= r(i, i);
            for (std::int64_t j = i + 1; j < n; ++j) moved[j] -= moved[i] * r(i, j);
        }
        Matrix miss(moved.size());
        for (std::int64_t j = 0; j < n; ++j) miss[j] = target[row * n + j] - weights[row * n + j] - moved[j];
        double error = 0.0, size = 0.0;
        for (const double value : times(miss)) error += value * value;
        for (const double value : times(moved)) size += value * value;
        // fp32, and on GPUs products of two bf16 parts: 2⁻¹⁶.
        const double tolerance = backend().activation_dtype() == DType::bf16 ? 1e-3 : 1e-4;
        EXPECT_LE(std::sqrt(error), tolerance * std::sqrt(size)) << "row " << row;
    }
}

TEST_P(ErrorPropagation, NothingToPropagateLeavesTheWeights) {
    const std::int64_t columns = 40;
    const auto weights = normal(3 * columns);
    std::vector<std::int32_t> order(static_cast<std::size_t>(columns));
    std::iota(order.begin(), order.end(), 0);
    Tensor none = upload(std::vector<float>(columns * columns, 0.0F), {columns, columns});
    EXPECT_EQ(propagate(weights, 3, none, factor(hessian(columns, 0.05), order), {}, 1.0F), weights);
}

TEST_P(ErrorPropagation, RowsDoNotFeelEachOther) {
    SCOPED_TRACE(trace());
    const std::int64_t rows = 3 * kSolveRowBlock + 17, columns = 200;
    const auto weights = normal(rows * columns);
    const auto order = permutation(columns);
    Tensor d = upload(normal(columns * columns, 0.1), {columns, columns});
    Tensor of_h = factor(hessian(columns, 0.05), order);
    const auto whole = propagate(weights, rows, d, of_h, order, 0.5F);
    for (const std::int64_t split : {kSolveRowBlock, 2 * kSolveRowBlock, 3 * kSolveRowBlock}) {
        const auto middle = static_cast<std::ptrdiff_t>(split * columns);
        auto parts = propagate({weights.begin(), weights.begin() + middle}, split, d, of_h, order, 0.5F);
        const auto rest =
            propagate({weights.begin() + middle, weights.end()}, rows - split, d, of_h, order, 0.5F);
        parts.insert(parts.end(), rest.begin(), rest.end());
        EXPECT_EQ(parts, whole) << split;
    }
}

TEST_P(ErrorPropagation, ThreadsDoNotChangeABit) {
    SCOPED_TRACE(trace());
    const std::int64_t tokens = 150, columns = 330, rows = 200;
    const auto x = normal(tokens * columns), original = normal(tokens * columns);
    const auto weights = normal(rows * columns);
    const auto order = permutation(columns);
    Tensor of_h = factor(hessian(columns, 0.05), order);
    expect_same_with_any_threads([&] {
        auto d = accumulate(original, x, tokens, columns, std::vector<float>(columns * columns, 0.0F)).d;
        const auto target = propagate(weights, rows, upload(d, {columns, columns}), of_h, order, 0.5F);
        d.insert(d.end(), target.begin(), target.end());
        return d;
    });
}

INSTANTIATE_TEST_SUITE_P(Backends, ErrorPropagation, ::testing::ValuesIn(built_backends()), backend_name);

}  // namespace
}  // namespace quantmill::testing
