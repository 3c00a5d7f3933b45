#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <ranges>
#include <utility>

#include "kernels/half.h"
#include "kernels/make_backend.h"
#include "pipeline/gptq_solver.h"

namespace quantmill {
namespace {

using Matrix = std::vector<double>;

class GptqSolver : public ::testing::Test {
protected:
    GptqSolver() : backend_(make_backend("cpu", 0)), seed_(std::random_device{}()), random_(seed_) {}

    // The lower triangle of an integer matrix as a fixed-point sum with exponents 0.
    Tensor sum_of(const std::vector<std::int64_t>& triangle) {
        Tensor sum = backend_->empty({static_cast<std::int64_t>(triangle.size())}, DType::i64, "sum");
        backend_->copy_from_host(triangle.data(), sum);
        return sum;
    }

    struct Factored {
        FactorOutcome outcome;
        std::vector<float> factor;
    };
    Factored factor(const std::vector<std::int64_t>& triangle, std::int64_t columns,
                    const GptqOptions& options) {
        factor_ = backend_->empty({columns, columns}, DType::f32, "factor");
        const FixedPointExponents exponents(static_cast<std::size_t>(columns), 0);
        // tokens 2: H is the integer matrix itself.
        Factored result{factor_hessian(*backend_, sum_of(triangle), exponents, 2, options, "module", factor_),
                        {}};
        result.factor.resize(static_cast<std::size_t>(columns * columns));
        backend_->copy_to_host(factor_, result.factor.data());
        return result;
    }

    // Σ_t x xᵀ of random integer inputs; columns in `dead` are never active.
    std::vector<std::int64_t> random_triangle(std::int64_t columns, int tokens,
                                              const std::vector<std::size_t>& dead = {}) {
        std::vector<std::int64_t> triangle(static_cast<std::size_t>(columns * (columns + 1) / 2));
        std::vector<std::int64_t> x(static_cast<std::size_t>(columns));
        for (int t = 0; t < tokens; ++t) {
            for (std::size_t j = 0; j < x.size(); ++j)
                x[j] = static_cast<std::int64_t>(random_() % (9 + 2 * (j % 7))) - 4;
            for (const std::size_t j : dead) x[j] = 0;
            for (std::size_t i = 0, at = 0; i < x.size(); ++i) {
                for (std::size_t j = 0; j <= i; ++j, ++at) triangle[at] += x[i] * x[j];
            }
        }
        return triangle;
    }

    std::unique_ptr<Backend> backend_;
    unsigned seed_;
    std::mt19937 random_;
    Tensor factor_;
};

double at(const std::vector<std::int64_t>& triangle, std::size_t i, std::size_t j) {
    return static_cast<double>(triangle[std::max(i, j) * (std::max(i, j) + 1) / 2 + std::min(i, j)]);
}

// The damped Hessian by the definition, in double precision.
Matrix damped_hessian(const std::vector<std::int64_t>& triangle, std::size_t n, double damp) {
    Matrix h(n * n);
    double mean = 0.0;
    for (std::size_t i = 0; i < n; ++i) mean += at(triangle, i, i) / static_cast<double>(n);
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j < n; ++j) h[i * n + j] = at(triangle, i, j);
        if (h[i * n + i] == 0.0) h[i * n + i] = 1.0;
        h[i * n + i] += damp * mean;
    }
    return h;
}

// R·Rᵀ from the stored form: R_ij / R_jj above the diagonal, R_jj on it.
double product(const std::vector<float>& factor, std::size_t n, std::size_t i, std::size_t j) {
    const auto r = [&](std::size_t a, std::size_t b) {
        return a == b ? double{factor[b * n + b]} : double{factor[a * n + b]} * factor[b * n + b];
    };
    double sum = 0.0;
    for (std::size_t k = std::max(i, j); k < n; ++k) sum += r(i, k) * r(j, k);
    return sum;
}

TEST_F(GptqSolver, FactorOfTheDampedHessian) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::size_t n = 70;
    const std::vector<std::size_t> dead{3, 40, 69};
    const auto triangle = random_triangle(n, 100, dead);
    const Factored result = factor(triangle, n, {{}, false, 0.02, 0.01});
    EXPECT_EQ(result.outcome.damp_percent, 0.02);
    EXPECT_FALSE(result.outcome.damping_raised || result.outcome.round_to_nearest);
    EXPECT_EQ(result.outcome.dead_columns, (std::vector<std::int32_t>{3, 40, 69}));
    EXPECT_TRUE(result.outcome.order.empty());
    const Matrix h = damped_hessian(triangle, n, 0.02);
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
            EXPECT_NEAR(product(result.factor, n, i, j), h[i * n + j],
                        1e-5 * std::sqrt(h[i * n + i] * h[j * n + j]));
        }
    }
}

TEST_F(GptqSolver, ActOrderFactorsTheSortedHessian) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::size_t n = 40;
    const auto triangle = random_triangle(n, 90, {7});
    const Factored result = factor(triangle, n, {{}, true, 0.05, 0.01});
    const auto& order = result.outcome.order;
    ASSERT_TRUE(std::ranges::is_permutation(order, std::views::iota(0, static_cast<int>(n))));
    const Matrix h = damped_hessian(triangle, n, 0.05);
    for (std::size_t i = 0; i < n; ++i) {
        const auto p = static_cast<std::size_t>(order[i]);
        if (i > 0) {
            const auto before = static_cast<std::size_t>(order[i - 1]);
            EXPECT_GE(h[before * n + before], h[p * n + p]);
            EXPECT_TRUE(h[before * n + before] != h[p * n + p] || before < p) << "ties keep their order";
        }
        for (std::size_t j = 0; j <= i; ++j) {
            const auto q = static_cast<std::size_t>(order[j]);
            EXPECT_NEAR(product(result.factor, n, i, j), h[p * n + q],
                        1e-5 * std::sqrt(h[p * n + p] * h[q * n + q]));
        }
    }
}

TEST_F(GptqSolver, DampingRisesUntilTheFactorizationSucceeds) {
    // Eigenvalues 210 and −10, mean diagonal 100: positive definite from a damping of 0.1 on.
    const Factored result = factor({100, 110, 100}, 2, {{}, false, 0.05, 0.02});
    EXPECT_NEAR(result.outcome.damp_percent, 0.11, 1e-12);
    EXPECT_TRUE(result.outcome.damping_raised);
    EXPECT_FALSE(result.outcome.round_to_nearest);
    EXPECT_NEAR(product(result.factor, 2, 0, 0), 111.0, 1e-3);
    EXPECT_NEAR(product(result.factor, 2, 1, 0), 110.0, 1e-3);
}

TEST_F(GptqSolver, RoundsToNearestAsTheLastResort) {
    for (const double increment : {0.0, 0.01}) {  // 0: damping must not be raised
        const Factored result = factor({100, 300, 100}, 2, {{}, true, 0.05, increment});
        EXPECT_TRUE(result.outcome.round_to_nearest);
        EXPECT_TRUE(result.outcome.order.empty());
        EXPECT_EQ(result.factor[1], 0.0F) << "columns must not be coupled";
        EXPECT_EQ(result.factor[0], 10.0F);
        EXPECT_EQ(result.factor[3], 10.0F);
    }
}

TEST_F(GptqSolver, OutcomeTravelsAsAMessage) {
    const FactorOutcome outcome{0.1 + 0.2, true, false, {1, 5}, {2, 0, 1}};
    const FactorOutcome copy = deserialize_factor_outcome(serialize(outcome));
    EXPECT_EQ(copy.damp_percent, outcome.damp_percent);
    EXPECT_TRUE(copy.damping_raised);
    EXPECT_FALSE(copy.round_to_nearest);
    EXPECT_EQ(copy.dead_columns, outcome.dead_columns);
    EXPECT_EQ(copy.order, outcome.order);
}

TEST_F(GptqSolver, GroupIndex) {
    GptqOptions options{{4, 2, true}};
    const std::vector<std::int32_t> natural{0, 0, 1, 1, 2};
    EXPECT_EQ(group_index({}, options, 5), natural);
    FactorOutcome sorted;
    sorted.order = {4, 0, 3, 1, 2};
    options.desc_act = true;  // columns 4 and 0 form group 0, …
    EXPECT_EQ(group_index(sorted, options, 5), (std::vector<std::int32_t>{0, 1, 2, 1, 0}));
    options.static_groups = true;
    EXPECT_EQ(group_index(sorted, options, 5), natural);
    options.static_groups = options.desc_act = false;
    options.act_group_aware = true;
    EXPECT_EQ(group_index(sorted, options, 5), natural);
}

TEST_F(GptqSolver, GroupAwareOrderSortsInsideGroupsAndGroupsByTheirLargest) {
    GptqOptions options{{4, 3, true}};
    options.act_group_aware = true;
    const std::vector<std::int64_t> diagonal{5, 7, 5, 9, 30, 2, 7, 6, 1, 100, 50};
    std::vector<std::int64_t> triangle;
    for (std::size_t i = 0; i < diagonal.size(); ++i) {
        triangle.insert(triangle.end(), i, 0);
        triangle.push_back(diagonal[i]);
    }
    const auto order = [&] {
        return factor(triangle, static_cast<std::int64_t>(diagonal.size()), options).outcome.order;
    };
    // Equals keep their order; the short last group, whatever it holds, stays as it is.
    EXPECT_EQ(order(), (std::vector<std::int32_t>{4, 3, 5, 1, 0, 2, 6, 7, 8, 9, 10}));
    options.grid.group_size = 11;  // one group a row
    EXPECT_EQ(order(), (std::vector<std::int32_t>{9, 10, 4, 3, 1, 6, 7, 0, 2, 5, 8}));
    options.grid.group_size = 20;
    EXPECT_EQ(order(), (std::vector<std::int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}));
}

struct Solved {
    std::vector<std::uint8_t> codes, zeros;
    std::vector<Half> scales;
    RowLosses losses;
    bool operator==(const Solved& other) const {
        return codes == other.codes && zeros == other.zeros && scales == other.scales &&
               losses.loss == other.losses.loss && losses.squared_error == other.losses.squared_error;
    }
};

// Solves all rows in the given ranges with the factor that factor() left.
Solved solve(Backend& backend, const std::vector<float>& weights, std::int64_t rows, std::int64_t columns,
             const std::vector<RowRange>& ranges, ConstTensorView factor, const FactorOutcome& outcome,
             const GptqOptions& options, ConstTensorView cross = {}, ConstTensorView hessian = {}) {
    QuantizedLinear quantized(backend, rows, columns, options.grid);
    quantized.g_idx = group_index(outcome, options, columns);
    Solved result;
    for (const RowRange& range : ranges) {
        Tensor piece = backend.empty({range.count(), columns}, DType::f32, "weights");
        backend.copy_from_host(weights.data() + range.begin * columns, piece);
        const RowLosses losses =
            solve_rows(backend, piece, range, factor, outcome, options, quantized, cross, hessian);
        result.losses.loss.insert(result.losses.loss.end(), losses.loss.begin(), losses.loss.end());
        result.losses.squared_error.insert(result.losses.squared_error.end(), losses.squared_error.begin(),
                                           losses.squared_error.end());
    }
    const auto fetch = [&backend](const Tensor& tensor, auto& values) {
        values.resize(static_cast<std::size_t>(tensor.shape().count()));
        backend.copy_to_host(tensor, values.data());
    };
    fetch(quantized.codes, result.codes);
    fetch(quantized.zeros, result.zeros);
    fetch(quantized.scales, result.scales);
    return result;
}

std::vector<float> random_weights(std::mt19937& random, std::int64_t count) {
    std::normal_distribution<float> normal(0.0F, 0.05F);
    std::vector<float> weights(static_cast<std::size_t>(count));
    for (float& w : weights) w = normal(random);
    return weights;
}

// Loss and error of rows, from the codes alone: tr((W − Q) H (W − Q)ᵀ) and |W − Q|².
RowLosses losses_by_definition(const Solved& solved, std::vector<float> weights, std::size_t n,
                               const Matrix& h, const FactorOutcome& outcome, const GptqOptions& options) {
    const auto g_idx = group_index(outcome, options, static_cast<std::int64_t>(n));
    const auto groups = static_cast<std::size_t>(options.grid.groups(static_cast<std::int64_t>(n)));
    RowLosses result;
    for (std::size_t row = 0; row < weights.size() / n; ++row) {
        for (const std::int32_t dead : outcome.dead_columns)
            weights[row * n + static_cast<std::size_t>(dead)] = 0.0F;
        std::vector<double> error(n);
        for (std::size_t c = 0; c < n; ++c) {
            const std::size_t group = row * groups + static_cast<std::size_t>(g_idx[c]);
            error[c] = weights[row * n + c] - double{to_float(solved.scales[group])} *
                                                  (solved.codes[row * n + c] - solved.zeros[group]);
        }
        double loss = 0.0, squared = 0.0;
        for (std::size_t i = 0; i < n; ++i) {
            squared += error[i] * error[i];
            for (std::size_t j = 0; j < n; ++j) loss += error[i] * h[i * n + j] * error[j];
        }
        result.loss.push_back(loss);
        result.squared_error.push_back(squared);
    }
    return result;
}

// Orders of columns, with scales of updated and of original weights.
std::vector<GptqOptions> orders(const QuantizationGrid& grid) {
    std::vector<GptqOptions> all;
    for (const bool static_groups : {false, true}) {
        GptqOptions options;
        options.grid = grid;
        options.static_groups = static_groups;
        all.push_back(options);
        options.desc_act = true;
        all.push_back(options);
        options.desc_act = false;
        options.act_group_aware = true;
        all.push_back(options);
    }
    return all;
}

// Grids in which each value of an option meets each value of every other.
const std::vector<QuantizationGrid> kPairwiseGrids{
    {2, 16, false, ScaleSearch::mse, false, true},     {2, 32, true, ScaleSearch::hessian, true, false},
    {3, 32, true, ScaleSearch::minmax, true, true},    {3, 90, false, ScaleSearch::hessian, false, false},
    {4, 32, false, ScaleSearch::minmax, false, true},  {4, 7, true, ScaleSearch::mse, true, false},
    {8, 200, true, ScaleSearch::hessian, false, true}, {8, 30, true, ScaleSearch::minmax, false, false}};

// The codes, scales, zeros and groups that come out have the loss that the walk found, whatever its order.
TEST_F(GptqSolver, LossesAreThoseOfTheCodes) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::size_t n = 90;
    const std::int64_t rows = 20;
    for (const QuantizationGrid& grid : kPairwiseGrids) {
        for (const GptqOptions& options : orders(grid)) {
            SCOPED_TRACE(fmt::format("{} bits, groups of {}, desc_act {} group-aware {} static {}", grid.bits,
                                     grid.group_size, options.desc_act, options.act_group_aware,
                                     options.static_groups));
            const auto triangle = random_triangle(n, 120, {11});
            const Factored factored = factor(triangle, n, options);
            const auto weights = random_weights(random_, rows * static_cast<std::int64_t>(n));
            const Solved solved =
                solve(*backend_, weights, rows, n, {{0, rows}}, factor_, factored.outcome, options);
            const RowLosses expected = losses_by_definition(
                solved, weights, n, damped_hessian(triangle, n, 0.05), factored.outcome, options);
            for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row) {
                EXPECT_NEAR(solved.losses.loss[row], expected.loss[row], 1e-3 * expected.loss[row]);
                EXPECT_NEAR(solved.losses.squared_error[row], expected.squared_error[row],
                            1e-5 * expected.squared_error[row]);
            }
        }
    }
}

// Whatever the order of the walk: scales are those of the groups as they lie.
TEST_F(GptqSolver, StaticGroupsKeepTheScalesOfTheOriginalWeights) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::size_t n = 80;
    const std::int64_t rows = 30;
    const auto triangle = random_triangle(n, 200);
    const auto weights = random_weights(random_, rows * static_cast<std::int64_t>(n));
    for (const ScaleSearch search : {ScaleSearch::minmax, ScaleSearch::mse}) {
        const QuantizationGrid grid{3, 16, true, search, true, false};
        Tensor natural = backend_->empty({rows, static_cast<std::int64_t>(n)}, DType::f32, "weights");
        backend_->copy_from_host(weights.data(), natural);
        QuantizedLinear expected(*backend_, rows, static_cast<std::int64_t>(n), grid);
        backend_->choose_grids(natural, {}, grid, expected.rows(0, rows));
        const auto* scales = expected.scales.view().data<Half>();
        for (const GptqOptions& options : orders(grid)) {
            if (!options.static_groups) continue;
            const FactorOutcome outcome = factor(triangle, n, options).outcome;
            const Solved solved = solve(*backend_, weights, rows, n, {{0, rows}}, factor_, outcome, options);
            EXPECT_EQ(solved.scales, std::vector<Half>(scales, scales + expected.scales.shape().count()));
        }
    }
}

// The same solve with columns sorted by hand, whose groups must come back to where they belong.
TEST_F(GptqSolver, GroupAwareIsThePlainSolveOfSortedColumns) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::size_t n = 64, size = 16;
    const std::int64_t rows = 20;
    const auto triangle = random_triangle(n, 200);
    const auto weights = random_weights(random_, rows * static_cast<std::int64_t>(n));
    GptqOptions options{{3, 16, true, ScaleSearch::hessian, true, true}};
    options.act_group_aware = true;
    const FactorOutcome outcome = factor(triangle, n, options).outcome;
    const Solved got = solve(*backend_, weights, rows, n, {{0, rows}}, factor_, outcome, options);

    std::vector<std::int64_t> sorted_triangle;
    std::vector<float> sorted_weights;
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
            sorted_triangle.push_back(std::llround(at(triangle, static_cast<std::size_t>(outcome.order[i]),
                                                      static_cast<std::size_t>(outcome.order[j]))));
        }
    }
    for (std::size_t k = 0; k < weights.size(); ++k) {
        sorted_weights.push_back(weights[k / n * n + static_cast<std::size_t>(outcome.order[k % n])]);
    }
    options.act_group_aware = false;
    const FactorOutcome natural = factor(sorted_triangle, n, options).outcome;
    const Solved expected = solve(*backend_, sorted_weights, rows, n, {{0, rows}}, factor_, natural, options);
    for (std::size_t k = 0; k < got.codes.size(); ++k) {
        const auto column = static_cast<std::size_t>(outcome.order[k % n]);
        EXPECT_EQ(got.codes[k / n * n + column], expected.codes[k]);
        EXPECT_EQ(got.scales[k / n * (n / size) + column / size],
                  expected.scales[k / n * (n / size) + k % n / size]);
    }
}

TEST_F(GptqSolver, ActOrderIsThePlainSolveOfSortedColumns) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::size_t n = 64;
    const std::int64_t rows = 20;
    const auto triangle = random_triangle(n, 200);
    const auto weights = random_weights(random_, rows * static_cast<std::int64_t>(n));
    const GptqOptions act{{4, 16, true}, true, 0.05, 0.01};
    const FactorOutcome outcome = factor(triangle, n, act).outcome;
    const Solved got = solve(*backend_, weights, rows, n, {{0, rows}}, factor_, outcome, act);

    std::vector<std::int64_t> sorted_triangle;
    std::vector<float> sorted_weights;
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
            sorted_triangle.push_back(std::llround(at(triangle, static_cast<std::size_t>(outcome.order[i]),
                                                      static_cast<std::size_t>(outcome.order[j]))));
        }
    }
    for (std::size_t k = 0; k < weights.size(); ++k) {
        sorted_weights.push_back(weights[k / n * n + static_cast<std::size_t>(outcome.order[k % n])]);
    }
    const GptqOptions plain{{4, 16, true}, false, 0.05, 0.01};
    const FactorOutcome natural = factor(sorted_triangle, n, plain).outcome;
    const Solved expected = solve(*backend_, sorted_weights, rows, n, {{0, rows}}, factor_, natural, plain);
    EXPECT_EQ(got.scales, expected.scales);
    for (std::size_t k = 0; k < got.codes.size(); ++k) {
        EXPECT_EQ(got.codes[k / n * n + static_cast<std::size_t>(outcome.order[k % n])], expected.codes[k]);
    }
}

TEST_F(GptqSolver, RowsMayBeSplitAnywhereAtBlocks) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::int64_t n = 96, rows = 3 * kSolveRowBlock + 10;
    const GptqOptions options{{4, 32, true}, true, 0.05, 0.01};
    const FactorOutcome outcome = factor(random_triangle(n, 150), n, options).outcome;
    const auto weights = random_weights(random_, rows * n);
    const Solved whole = solve(*backend_, weights, rows, n, {{0, rows}}, factor_, outcome, options);
    const std::vector<RowRange> pieces{{0, kSolveRowBlock},
                                       {kSolveRowBlock, 3 * kSolveRowBlock},
                                       {3 * kSolveRowBlock, 3 * kSolveRowBlock},
                                       {3 * kSolveRowBlock, rows}};
    EXPECT_EQ(solve(*backend_, weights, rows, n, pieces, factor_, outcome, options), whole);
}

// Inputs of a linear on both paths: of the quantized one in whole numbers, so that its Hessian is exact.
struct TwoPaths {
    std::int64_t tokens, columns;
    std::vector<float> original, x;  // [T, C]

    TwoPaths(std::mt19937& random, std::int64_t t, std::int64_t c, std::size_t dead)
        : tokens(t), columns(c), original(static_cast<std::size_t>(t * c)), x(original.size()) {
        std::normal_distribution<float> error(0.0F, 0.6F);
        for (std::size_t i = 0; i < x.size(); ++i) {
            const std::size_t column = i % static_cast<std::size_t>(c);
            const auto number = static_cast<float>(random() % (9 + 2 * (column % 7))) - 4.0F;
            x[i] = column == dead ? 0.0F : number;  // on the original path it is active
            original[i] = number + error(random);
        }
        // An error that inputs share is one that other columns can make up for.
        for (std::int64_t i = 0; i < tokens; ++i) {
            for (std::int64_t j = 0; j + 1 < columns; ++j) original[i * c + j] += 0.3F * x[i * c + j + 1];
        }
    }

    std::vector<std::int64_t> triangle() const {
        std::vector<std::int64_t> sum;
        for (std::int64_t i = 0; i < columns; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) {
                double total = 0.0;
                for (std::int64_t t = 0; t < tokens; ++t) {
                    total += double{x[t * columns + i]} * x[t * columns + j];
                }
                sum.push_back(std::llround(total));
            }
        }
        return sum;
    }
    Matrix cross() const {  // as the triangle, without 2 / tokens
        Matrix d(static_cast<std::size_t>(columns * columns));
        for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t i = 0; i < columns; ++i) {
                const double error = double{original[t * columns + i]} - x[t * columns + i];
                for (std::int64_t j = 0; j < columns; ++j) d[i * columns + j] += error * x[t * columns + j];
            }
        }
        return d;
    }
    // ‖Q·X̃ᵀ − W·Xᵀ‖², W as on the original path.
    double output_error(const Matrix& q, const std::vector<float>& w) const {
        double error = 0.0;
        for (std::size_t row = 0; row < w.size() / static_cast<std::size_t>(columns); ++row) {
            const auto* q_row = q.data() + row * static_cast<std::size_t>(columns);
            const auto* w_row = w.data() + row * static_cast<std::size_t>(columns);
            for (std::int64_t t = 0; t < tokens; ++t) {
                double miss = 0.0;
                for (std::int64_t j = 0; j < columns; ++j) {
                    miss += q_row[j] * x[t * columns + j] - double{w_row[j]} * original[t * columns + j];
                }
                error += miss * miss;
            }
        }
        return error;
    }
};

// W + alpha·W·D·H⁻¹ by Gaussian elimination in double precision, dead columns 0.
Matrix target_by_definition(const std::vector<float>& weights, std::size_t n, const Matrix& d, Matrix h,
                            double alpha, const std::vector<std::int32_t>& dead) {
    const std::size_t rows = weights.size() / n;
    Matrix moved(rows * n);
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t k = 0; k < n; ++k) {
            for (std::size_t j = 0; j < n; ++j) moved[r * n + j] += double{weights[r * n + k]} * d[k * n + j];
        }
    }
    // H·yᵀ = (W·D)ᵀ for all rows at once; H needs no pivoting.
    for (std::size_t k = 0; k < n; ++k) {
        for (std::size_t i = k + 1; i < n; ++i) {
            const double share = h[i * n + k] / h[k * n + k];
            for (std::size_t j = k; j < n; ++j) h[i * n + j] -= share * h[k * n + j];
            for (std::size_t r = 0; r < rows; ++r) moved[r * n + i] -= share * moved[r * n + k];
        }
    }
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t i = n; i-- > 0;) {
            for (std::size_t j = i + 1; j < n; ++j) moved[r * n + i] -= h[i * n + j] * moved[r * n + j];
            moved[r * n + i] /= h[i * n + i];
        }
        for (std::size_t j = 0; j < n; ++j) moved[r * n + j] = weights[r * n + j] + alpha * moved[r * n + j];
        for (const std::int32_t column : dead) moved[r * n + static_cast<std::size_t>(column)] = 0.0;
    }
    return moved;
}

Matrix dequantized(const Solved& solved, std::size_t n, const FactorOutcome& outcome,
                   const GptqOptions& options) {
    const auto g_idx = group_index(outcome, options, static_cast<std::int64_t>(n));
    const auto groups = static_cast<std::size_t>(options.grid.groups(static_cast<std::int64_t>(n)));
    Matrix q(solved.codes.size());
    for (std::size_t k = 0; k < q.size(); ++k) {
        const std::size_t group = k / n * groups + static_cast<std::size_t>(g_idx[k % n]);
        q[k] = double{to_float(solved.scales[group])} * (solved.codes[k] - solved.zeros[group]);
    }
    return q;
}

TEST_F(GptqSolver, ErrorPropagationSolvesForTheTargetOfTheFormula) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::size_t n = 90;
    const std::int64_t rows = 70;
    const TwoPaths paths(random_, 200, n, 11);
    const Matrix d = paths.cross();
    const std::vector<float> cross(d.begin(), d.end());
    Tensor cross_tensor =
        backend_->empty({static_cast<std::int64_t>(n), static_cast<std::int64_t>(n)}, DType::f32, "D");
    backend_->copy_from_host(cross.data(), cross_tensor);
    for (const bool desc_act : {false, true}) {
        GptqOptions options{{3, 32, true}, desc_act, 0.05, 0.01};
        const Factored factored = factor(paths.triangle(), n, options);
        const FactorOutcome& outcome = factored.outcome;
        ASSERT_EQ(outcome.dead_columns, std::vector<std::int32_t>{11});
        const auto weights = random_weights(random_, rows * static_cast<std::int64_t>(n));
        const auto solve_with = [&](double alpha, const std::vector<float>& w) {
            options.error_propagation_alpha = alpha;
            return solve(*backend_, w, rows, n, {{0, kSolveRowBlock}, {kSolveRowBlock, rows}}, factor_,
                         outcome, options, cross_tensor);
        };
        const Solved off = solve_with(0.0, weights), half = solve_with(0.5, weights),
                     all = solve_with(1.0, weights);
        const GptqOptions plain{options.grid, desc_act};
        EXPECT_EQ(off, solve(*backend_, weights, rows, n, {{0, rows}}, factor_, outcome, plain));
        // The codes are those of a plain solve for the target.
        const Matrix h = damped_hessian(paths.triangle(), n, 0.05);
        const Matrix target = target_by_definition(weights, n, d, h, 0.5, outcome.dead_columns);
        const Solved expected = solve_with(0.0, {target.begin(), target.end()});
        std::size_t same = 0;
        for (std::size_t k = 0; k < half.codes.size(); ++k) same += half.codes[k] == expected.codes[k];
        EXPECT_GE(same, half.codes.size() * 99 / 100);
        EXPECT_NE(off.codes, half.codes) << "nothing was propagated";
        // Losses count from the target, squared errors from the weights.
        const RowLosses of_target =
            losses_by_definition(half, {target.begin(), target.end()}, n, h, outcome, options);
        const RowLosses of_weights = losses_by_definition(half, weights, n, h, outcome, options);
        for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row) {
            EXPECT_NEAR(half.losses.loss[row], of_target.loss[row], 1e-3 * of_target.loss[row]);
            EXPECT_NEAR(half.losses.squared_error[row], of_weights.squared_error[row],
                        1e-5 * of_weights.squared_error[row]);
        }
        // What it is for: outputs closer to those of the original model.
        const auto error = [&](const Solved& solved) {
            return paths.output_error(dequantized(solved, n, outcome, options), weights);
        };
        EXPECT_LT(error(half), 0.8 * error(off));
        EXPECT_LT(error(all), error(half));
    }
}

TEST_F(GptqSolver, WhatIsRoundedToNearestPropagatesNothing) {
    GptqOptions options{{4, 2, true}, false, 0.05, 0.01};
    options.error_propagation_alpha = 1.0;
    const FactorOutcome outcome = factor({100, 300, 100}, 2, options).outcome;
    EXPECT_EQ(propagated_alpha(outcome, options), 0.0);
    EXPECT_EQ(propagated_alpha({}, options), 1.0);
    const auto weights = random_weights(random_, 2 * 50);
    const Solved solved = solve(*backend_, weights, 50, 2, {{0, 50}}, factor_, outcome, options);
    EXPECT_EQ(solved, solve(*backend_, weights, 50, 2, {{0, 50}}, factor_, outcome, {{4, 2, true}}));
}

// A diagonal factor couples nothing: each code is the nearest on the grid of its group's own range.
TEST_F(GptqSolver, TheDampedHessianIsTheOneThatWasFactored) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::size_t n = 60;
    const auto triangle = random_triangle(n, 100, {5, 33});
    const FactorOutcome outcome = factor(triangle, n, {{}, true, 0.03, 0.01}).outcome;
    Tensor h = backend_->empty({n, n}, DType::f32, "damped Hessian");
    quantmill::damped_hessian(*backend_, sum_of(triangle), FixedPointExponents(n, 0), 2, outcome, h);
    std::vector<float> found(n * n);
    backend_->copy_to_host(h, found.data());
    const Matrix expected = damped_hessian(triangle, n, 0.03);
    for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-6 * expected[0]);
}

// In every order of the columns: the loss that is reported is that of what is stored, and no row loses.
TEST_F(GptqSolver, RefiningLowersTheLossOfEveryRow) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::size_t n = 96;
    const std::int64_t rows = 70;
    const auto triangle = random_triangle(n, 130, {11});
    const Matrix h = damped_hessian(triangle, n, 0.05);
    const std::vector<float> h_float(h.begin(), h.end());
    Tensor hessian = backend_->empty({n, n}, DType::f32, "damped Hessian");
    backend_->copy_from_host(h_float.data(), hessian);
    const auto weights = random_weights(random_, rows * static_cast<std::int64_t>(n));
    for (const int order : {0, 1, 2, 3}) {
        GptqOptions options{{3, 16, true}, order == 1 || order == 3, 0.05, 0.01};
        options.act_group_aware = order == 2;
        options.static_groups = order == 3;
        const FactorOutcome outcome = factor(triangle, n, options).outcome;
        const auto run = [&] {
            return solve(*backend_, weights, rows, n, {{0, kSolveRowBlock}, {kSolveRowBlock, rows}}, factor_,
                         outcome, options, {}, hessian);
        };
        const Solved plain = run();
        double before = 0.0;
        for (const double loss : plain.losses.loss) before += loss;
        for (const auto& [refit, sweeps] : {std::pair{true, 0}, {false, 1}, {true, 2}}) {
            options.refit = refit;
            options.sweeps = sweeps;
            const Solved refined = run();
            const RowLosses exact = losses_by_definition(refined, weights, n, h, outcome, options);
            double after = 0.0;
            for (std::size_t row = 0; row < exact.loss.size(); ++row) {
                EXPECT_NEAR(refined.losses.loss[row], exact.loss[row], 1e-3 * exact.loss[row]);
                EXPECT_LE(exact.loss[row], plain.losses.loss[row] * 1.001)
                    << "order " << order << ", " << row;
                after += exact.loss[row];
            }
            EXPECT_LT(after, 0.99 * before) << "order " << order << ", refit " << refit << ", " << sweeps;
        }
    }
}

// With every grid and order: losses count from the target of error propagation, in double, and refinement
// lowers them.
TEST_F(GptqSolver, PropagationAndRefinementGoWithEveryGridAndOrder) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    constexpr std::int64_t n = 90, rows = 20;
    const TwoPaths paths(random_, 200, n, 11);
    const Matrix d = paths.cross(), h = damped_hessian(paths.triangle(), n, 0.05);
    const auto upload = [&](const Matrix& matrix) {
        const std::vector<float> values(matrix.begin(), matrix.end());
        Tensor tensor = backend_->empty({n, n}, DType::f32, "a matrix");
        backend_->copy_from_host(values.data(), tensor);
        return tensor;
    };
    const Tensor cross = upload(d), hessian = upload(h);
    const auto weights = random_weights(random_, rows * n);
    for (const QuantizationGrid& grid : kPairwiseGrids) {
        for (GptqOptions options : orders(grid)) {
            const FactorOutcome outcome = factor(paths.triangle(), n, options).outcome;
            for (const double alpha : {0.0, 1.0}) {
                options.error_propagation_alpha = alpha;
                const Matrix target = target_by_definition(weights, n, d, h, alpha, outcome.dead_columns);
                std::vector<double> walked;
                for (const auto& [refit, sweeps] : {std::pair{false, 0}, {true, 0}, {false, 2}, {true, 1}}) {
                    SCOPED_TRACE(
                        fmt::format("{} bits, groups of {}, desc_act {} group-aware {} static {}, alpha {}, "
                                    "refit {}, {} sweeps",
                                    grid.bits, grid.group_size, options.desc_act, options.act_group_aware,
                                    options.static_groups, alpha, refit, sweeps));
                    options.refit = refit;
                    options.sweeps = sweeps;
                    const Solved solved = solve(*backend_, weights, rows, n, {{0, rows}}, factor_, outcome,
                                                options, cross, hessian);
                    const std::vector<double>& loss = solved.losses.loss;
                    const RowLosses exact =
                        losses_by_definition(solved, {target.begin(), target.end()}, n, h, outcome, options);
                    if (walked.empty()) walked = loss;
                    for (std::size_t row = 0; row < loss.size(); ++row) {
                        EXPECT_NEAR(loss[row], exact.loss[row], 2e-3 * exact.loss[row]) << row;
                        EXPECT_LE(exact.loss[row], 1.002 * walked[row]) << row;
                    }
                }
                options.refit = false;
                options.sweeps = 0;
            }
        }
    }
}

TEST_F(GptqSolver, FallbackRoundsToNearest) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const GptqOptions options{{4, 2, true}, false, 0.05, 0.01};
    const FactorOutcome outcome = factor({100, 300, 100}, 2, options).outcome;
    ASSERT_TRUE(outcome.round_to_nearest);
    const auto weights = random_weights(random_, 2 * 50);
    const Solved solved = solve(*backend_, weights, 50, 2, {{0, 50}}, factor_, outcome, options);
    for (std::size_t row = 0; row < 50; ++row) {
        const float absmax = std::max(std::abs(weights[2 * row]), std::abs(weights[2 * row + 1]));
        const float scale = to_float(to_half(2.0F * absmax / 15.0F));
        EXPECT_EQ(to_float(solved.scales[row]), scale);
        for (std::size_t c = 0; c < 2; ++c) {
            const double nearest =
                std::clamp(std::nearbyint(double{weights[2 * row + c]} / scale) + 8.0, 0.0, 15.0);
            EXPECT_EQ(solved.codes[2 * row + c], nearest);
        }
    }
}

// Chen et al. 2010, equation 23, in double precision on the matrix itself.
TEST_F(GptqSolver, DampingFromTheData) {
    constexpr std::size_t n = 48;
    GptqOptions options;
    options.auto_damping = true;
    double before = 0.5;
    for (const int tokens : {4, 40, 400, 40'000}) {
        const auto triangle = random_triangle(n, std::min(tokens, 400));
        double trace = 0.0, square = 0.0;
        for (std::size_t i = 0; i < n; ++i) {
            trace += at(triangle, i, i);
            for (std::size_t j = 0; j < n; ++j) square += at(triangle, i, j) * at(triangle, i, j);
        }
        const double p = n;
        const double rho = std::min(1.0, ((1 - 2 / p) * square + trace * trace) /
                                             ((tokens + 1 - 2 / p) * (square - trace * trace / p)));
        const double expected = rho == 1.0 ? 0.5 : std::clamp(rho / (1 - rho), 0.01, 0.5);
        const double damping = shrinkage_damping(trace, square, tokens, p);
        EXPECT_NEAR(damping, expected, 1e-12) << tokens << " tokens, seed " << seed_;
        EXPECT_LE(damping, before);
        before = damping;
        if (tokens != 4) continue;
        // The program's own sums, of a Hessian that says 2 tokens.
        EXPECT_NEAR(factor(triangle, n, options).outcome.damp_percent, shrinkage_damping(trace, square, 2, p),
                    1e-6);
    }
    EXPECT_EQ(before, 0.01);
    EXPECT_EQ(shrinkage_damping(48.0, 48.0, 100.0, 48.0), 0.5) << "a multiple of the identity";
}

TEST_F(GptqSolver, FewTokensLeaveTheDiagonal) {
    constexpr std::int64_t n = 64;
    const auto triangle = random_triangle(n, 100);
    GptqOptions options;
    options.few_tokens = 1.0 / 16.0;  // factor() says 2 tokens: fewer than 4
    const Factored result = factor(triangle, n, options);
    EXPECT_TRUE(result.outcome.few_tokens);
    EXPECT_TRUE(result.outcome.round_to_nearest);
    EXPECT_TRUE(deserialize_factor_outcome(serialize(result.outcome)).few_tokens);
    for (std::size_t i = 0; i < n; ++i) {
        EXPECT_FLOAT_EQ(result.factor[i * n + i], static_cast<float>(std::sqrt(at(triangle, i, i))));
        for (std::size_t j = i + 1; j < n; ++j) EXPECT_EQ(result.factor[i * n + j], 0.0F);
    }
    options.few_tokens = 1.0 / 32.0;
    EXPECT_FALSE(factor(triangle, n, options).outcome.few_tokens);
}

// GPTQ of symmetric min-max grids by its first description (Frantar et al. 2022, algorithm 1), in extended
// precision.
std::vector<float> gptq_by_definition(const std::vector<float>& w, std::size_t rows, const Matrix& h,
                                      std::size_t n, std::size_t group_size, int bits) {
    using Number = long double;
    std::vector<Number> inverse(n * n), a(h.begin(), h.end());  // Gauss-Jordan
    for (std::size_t i = 0; i < n; ++i) inverse[i * n + i] = 1;
    for (std::size_t p = 0; p < n; ++p) {
        const Number pivot = a[p * n + p];
        for (std::size_t j = 0; j < n; ++j) a[p * n + j] /= pivot, inverse[p * n + j] /= pivot;
        for (std::size_t i = 0; i < n; ++i) {
            const Number factor = i == p ? 0 : a[i * n + p];
            for (std::size_t j = 0; j < n; ++j) {
                a[i * n + j] -= factor * a[p * n + j];
                inverse[i * n + j] -= factor * inverse[p * n + j];
            }
        }
    }
    std::vector<float> q(w.size());
    const Number half = std::pow(2.0, bits - 1);
    for (std::size_t r = 0; r < rows; ++r) {
        std::vector<Number> row(w.begin() + static_cast<std::ptrdiff_t>(r * n),
                                w.begin() + static_cast<std::ptrdiff_t>((r + 1) * n)),
            left = inverse;  // of the columns from j on
        Number scale = 0;
        for (std::size_t j = 0; j < n; ++j) {
            if (j % group_size == 0) {
                Number extreme = 0;
                for (std::size_t c = j; c < std::min(n, j + group_size); ++c)
                    extreme = std::max(extreme, std::abs(row[c]));
                scale = to_float(to_half(static_cast<float>(2 * extreme / (2 * half - 1))));
            }
            const Number quantized = scale * std::clamp(std::round(row[j] / scale), -half, half - 1);
            q[r * n + j] = static_cast<float>(quantized);
            const Number error = (row[j] - quantized) / left[j * n + j];
            for (std::size_t c = j; c < n; ++c) row[c] -= error * left[j * n + c];
            for (std::size_t c = j + 1; c < n; ++c) {
                const Number part = left[c * n + j] / left[j * n + j];
                for (std::size_t d = j + 1; d < n; ++d) left[c * n + d] -= part * left[j * n + d];
            }
        }
    }
    return q;
}

// Ranks far below the width, and columns whose sizes differ by up to 10^6, so their squares by 10^12. With
// next to no damping GPTQ itself, exact or not, does worse than rounding: so it is held against itself in
// extended precision.
TEST_F(GptqSolver, IllConditionedHessiansAreSolvedAsInExtendedPrecision) {
    constexpr std::int64_t n = 96, rows = 64;
    for (const auto& [tokens, largest] :
         {std::pair{2, 1}, {8, 1}, {8, 1000}, {24, 1'000'000}, {96, 1'000'000}}) {
        std::vector<std::int64_t> triangle(n * (n + 1) / 2), x(n);
        for (int t = 0; t < tokens; ++t) {
            for (std::size_t j = 0; j < n; ++j) {
                const double size = std::pow(largest, static_cast<double>(j * 37 % n) / (n - 1));
                x[j] = std::llround(size * (static_cast<double>(random_() % 2001) - 1000.0) / 100.0);
                if (x[j] == 0) x[j] = 1;  // no column is dead
            }
            for (std::size_t i = 0, k = 0; i < n; ++i) {
                for (std::size_t j = 0; j <= i; ++j, ++k) triangle[k] += x[i] * x[j];
            }
        }
        std::vector<float> w(rows * n);
        for (float& value : w) value = std::normal_distribution<float>()(random_);
        const auto quantize = [&](bool diagonal, double& damp_percent) {
            GptqOptions options;
            options.grid = {4, 32, true};
            options.damp_percent = damp_percent;
            options.few_tokens = diagonal ? 1.0 : 0.0;  // rounding to nearest
            const Factored factored = factor(triangle, n, options);
            EXPECT_EQ(factored.outcome.round_to_nearest, diagonal) << tokens << " tokens, seed " << seed_;
            damp_percent = factored.outcome.damp_percent;
            for (std::size_t i = 0; i < n; ++i) {
                for (std::size_t j = i; j < n; ++j) EXPECT_TRUE(std::isfinite(factored.factor[i * n + j]));
            }
            Tensor weights = backend_->empty({rows, n}, DType::f32, "weights");
            backend_->copy_from_host(w.data(), weights);
            QuantizedLinear quantized(*backend_, rows, n, options.grid);
            quantized.g_idx = group_index(factored.outcome, options, n);
            solve_rows(*backend_, weights, {0, rows}, factor_, factored.outcome, options, quantized);
            Tensor dequantized = backend_->empty({rows, n}, DType::f32, "dequantized");
            backend_->dequantize(std::as_const(quantized).rows(0, rows), quantized.g_idx, dequantized);
            std::vector<float> q(rows * n);
            backend_->copy_to_host(dequantized, q.data());
            return q;
        };
        for (double damp_percent : {0.01, 1e-5, 1e-12}) {
            SCOPED_TRACE(fmt::format("{} tokens, sizes to {}, damping {}, seed {}", tokens, largest,
                                     damp_percent, seed_));
            const bool usual = damp_percent == 0.01;
            double ignored = damp_percent;
            const std::vector<float> rounded = quantize(true, ignored),
                                     solved = quantize(false, damp_percent);
            const Matrix h = damped_hessian(triangle, n, damp_percent);
            const auto loss_of = [&](const std::vector<float>& q) {
                double loss = 0.0;
                for (std::size_t r = 0; r < rows; ++r) {
                    for (std::size_t i = 0; i < n; ++i) {
                        for (std::size_t j = 0; j < n; ++j) {
                            loss +=
                                (w[r * n + i] - q[r * n + i]) * h[i * n + j] * (w[r * n + j] - q[r * n + j]);
                        }
                    }
                }
                return loss;
            };
            const double loss = loss_of(solved), exact = loss_of(gptq_by_definition(w, rows, h, n, 32, 4));
            EXPECT_LE(loss,
                      1.5 * exact);  // below fp32's precision codes differ, and with them all that follow
            if (usual) {
                EXPECT_NEAR(loss, exact, 0.02 * exact);
                EXPECT_LE(loss, loss_of(rounded));
            }
        }
    }
}

}  // namespace
}  // namespace quantmill
