#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/backend_test.h"

// The textbook: plain double precision, three factorizations, one column after the other, nothing shared
// with the code under test.
namespace textbook {

using Matrix = std::vector<double>;  // square, row-major

// Lower L with A = L·Lᵀ.
Matrix cholesky(const Matrix& a, std::size_t n) {
    Matrix l(n * n, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
            double sum = a[i * n + j];
            for (std::size_t k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
            l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
        }
    }
    return l;
}

// A⁻¹ = L⁻ᵀ·L⁻¹.
Matrix inverse(const Matrix& a, std::size_t n) {
    const Matrix l = cholesky(a, n);
    Matrix m(n * n, 0.0);  // L⁻¹, stored transposed: m[j * n + i] = (L⁻¹)_ij
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = j; i < n; ++i) {
            double sum = i == j ? 1.0 : 0.0;
            for (std::size_t k = j; k < i; ++k) sum -= l[i * n + k] * m[j * n + k];
            m[j * n + i] = sum / l[i * n + i];
        }
    }
    Matrix result(n * n);
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
            double sum = 0.0;
            for (std::size_t k = i; k < n; ++k) sum += m[i * n + k] * m[j * n + k];
            result[i * n + j] = result[j * n + i] = sum;
        }
    }
    return result;
}

enum class Measure { range, power, weighted };  // minmax, mse, hessian

struct Settings {
    int bits;
    std::size_t group_size;
    bool sym;
    Measure measure = Measure::range;
    bool negative = false;  // scales may be
    int significant = 11;   // bits of a scale
};

struct Solution {
    std::vector<int> codes;      // [rows, n]
    std::vector<double> scales;  // [rows, groups]
    std::vector<int> zeros;      // [rows, groups]
    std::vector<double> loss;    // [rows]
    std::size_t adopted = 0;     // decisions taken over from the peer
};

constexpr double kBoundary = 1e-4;  // of a step
constexpr double kTie = 1e-2;       // of fp16's last place: less than 1e-5 of the scale

bool near_tie(double x, double tolerance) { return std::abs(x - std::floor(x) - 0.5) < tolerance; }

// Rounds half to even, except that within `tolerance` of a tie the peer's choice counts: both are right
// there, and every later value of the row depends on it.
double round_like(double x, double peer, double tolerance, std::size_t& adopted) {
    const double lower = std::floor(x);
    if (!near_tie(x, tolerance) || (peer != lower && peer != lower + 1)) return std::nearbyint(x);
    adopted += peer != std::nearbyint(x) ? 1 : 0;
    return peer;
}

// To binary16's normal numbers of so many significant bits; what is below becomes the smallest, what is above
// the largest.
double round_scale(double x, double peer, int significant, std::size_t& adopted, bool& certain) {
    if (x < 0x1p-14) return 0x1p-14;
    if (x > 32768 * (2 - std::ldexp(1.0, 1 - significant))) {
        return 32768 * (2 - std::ldexp(1.0, 1 - significant));
    }
    const double unit = std::ldexp(1.0, std::ilogb(x) + 1 - significant);
    certain = !near_tie(x / unit, kTie);
    return unit * round_like(x / unit, peer / unit, kTie, adopted);
}

struct Grid {
    double scale;
    double zero;
    bool certain = true;  // no rounding of it lay next to a tie
    bool operator==(const Grid& other) const { return scale == other.scale && zero == other.zero; }
};

double nearest_code(double x, const Grid& grid, double top) {
    return std::clamp(std::nearbyint(x / grid.scale + grid.zero), 0.0, top);
}

double loss_of(const std::vector<double>& x, const std::vector<double>& importance, const Grid& grid,
               const Settings& settings) {
    const double top = std::pow(2.0, settings.bits) - 1;
    double loss = 0.0;
    for (std::size_t j = 0; j < x.size(); ++j) {
        const double miss = std::abs(x[j] - grid.scale * (nearest_code(x[j], grid, top) - grid.zero));
        loss += settings.measure == Measure::power ? std::pow(miss, 2.4) : importance[j] * miss * miss;
    }
    return loss;
}

// Shares of the min-max scale that are tried at first.
std::vector<double> shares_of(Measure measure) {
    std::vector<double> shares;
    if (measure == Measure::range) shares.push_back(1.0);
    for (int i = 0; measure == Measure::power && i < 80; ++i) shares.push_back(1.0 - i / 100.0);
    for (int i = 0; measure == Measure::weighted && i < 9; ++i) shares.push_back(1.05 - 0.1 * i);
    return shares;
}

// The grids of these shares, in the order in which they are tried.
std::vector<Grid> candidates(const std::vector<double>& shares, double low, double high,
                             const Settings& settings, const Grid& peer, std::size_t& adopted) {
    const double top = std::pow(2.0, settings.bits) - 1;
    std::vector<Grid> grids;
    for (const double share : shares) {
        const double range = settings.sym ? 2 * std::max(-low, high) : high - low;
        bool certain = true;
        const double scale =
            round_scale(share * range / top, std::abs(peer.scale), settings.significant, adopted, certain);
        if (settings.sym) {
            const Grid grid{scale, (top + 1) / 2, certain};
            const Grid negative{-scale, grid.zero, certain};
            if (settings.measure == Measure::range) {
                grids.push_back(settings.negative && high > -low ? negative : grid);
                continue;
            }
            grids.push_back(grid);
            if (settings.negative) grids.push_back(negative);
            continue;
        }
        const double offset = -share * low / scale;
        const double zero = std::clamp(round_like(offset, peer.zero, kBoundary, adopted), 0.0, top);
        certain = certain && !near_tie(offset, kBoundary);
        grids.push_back({scale, zero, certain});
        if (settings.bits != 2 || settings.measure == Measure::range) continue;
        // GPTQModel: at 2 bits the other integer next to the ideal zero is tried as well.
        const double lower = std::clamp(std::floor(offset), 0.0, top);
        const double upper = std::clamp(std::ceil(offset), 0.0, top);
        grids.push_back({scale, zero == lower ? upper : lower, certain});
    }
    return grids;
}

// Grids with their losses. What is as good as the best that is certain may be what fp32 took.
class Tried {
public:
    Tried(std::vector<Grid> grids, const std::vector<double>& x, const std::vector<double>& importance,
          const Settings& settings)
        : grids_(std::move(grids)) {
        double least = std::numeric_limits<double>::infinity();
        for (std::size_t i = 0; i < grids_.size(); ++i) {
            losses_.push_back(loss_of(x, importance, grids_[i], settings));
            if (losses_[i] < losses_[best_]) best_ = i;
            if (grids_[i].certain) least = std::min(least, losses_[i]);
        }
        if (least == std::numeric_limits<double>::infinity()) least = losses_[best_];  // none is certain
        // What is left of a weight is known to an ulp or two of fp32 of the weight.
        double ulps = 0.0;
        for (std::size_t j = 0; settings.measure == Measure::weighted && j < x.size(); ++j) {
            ulps += importance[j] * x[j] * x[j] * 0x1p-44;
        }
        limit_ = std::pow(std::sqrt(least) + std::sqrt(ulps), 2) * (1 + 1e-5 * std::pow(2.0, settings.bits));
    }
    std::size_t size() const { return grids_.size(); }
    std::size_t best() const { return best_; }
    const Grid& operator[](std::size_t i) const { return grids_[i]; }
    bool plausible(std::size_t i) const { return i == best_ || losses_[i] <= limit_; }

private:
    std::vector<Grid> grids_;
    std::vector<double> losses_;
    std::size_t best_ = 0;
    double limit_;
};

// The grid of a group; the peer's where that is plausible. A search by the Hessian goes on around the best
// share.
Grid choose(const std::vector<double>& x, const std::vector<double>& importance, const Settings& settings,
            const Grid& peer, std::size_t& adopted) {
    const double low = std::min(0.0, *std::min_element(x.begin(), x.end()));
    const double high = std::max(0.0, *std::max_element(x.begin(), x.end()));
    const auto try_all = [&](const std::vector<double>& shares) {
        return Tried(candidates(shares, low, high, settings, peer, adopted), x, importance, settings);
    };
    const std::vector<double> shares = shares_of(settings.measure);
    const Tried coarse = try_all(shares);
    if (coarse.size() == 1) return coarse[0];
    Grid chosen{};
    for (std::size_t center = 0; center < coarse.size(); ++center) {
        if (!coarse.plausible(center)) continue;
        std::vector<double> beside;
        const int around = settings.measure == Measure::weighted ? 4 : 0;
        for (int i = -around; i <= around; ++i) {
            beside.push_back(shares[center * shares.size() / coarse.size()] + i / 80.0);
        }
        const Tried fine = try_all(beside);
        if (center == coarse.best()) chosen = fine[fine.best()];
        for (std::size_t i = 0; i < fine.size(); ++i) {
            if (!(fine[i] == peer) || !fine.plausible(i)) continue;
            adopted += i == fine.best() && center == coarse.best() ? 0 : 1;
            return peer;
        }
    }
    return chosen;
}

// GPTQ of w [rows, n] with the damped Hessian h; w is used up. Ties are decided as the peer did. With
// `given`, a group for each column, scales and zeros are the peer's.
Solution gptq(std::vector<double> w, const Matrix& h, std::size_t rows, std::size_t n,
              const Settings& settings, const Solution& peer, const std::vector<std::int32_t>& given = {}) {
    // H⁻¹ = Uᵀ·U with U upper: U = Lᵀ.
    const Matrix lower = cholesky(inverse(h, n), n);
    const auto u = [&](std::size_t i, std::size_t j) { return lower[j * n + i]; };
    std::vector<double> importance(n);
    for (std::size_t j = 0; j < n; ++j) importance[j] = 1.0 / (u(j, j) * u(j, j));
    const double top = std::pow(2.0, settings.bits) - 1;
    const std::size_t groups = (n + settings.group_size - 1) / settings.group_size;
    Solution result{std::vector<int>(rows * n), peer.scales, peer.zeros, std::vector<double>(rows, 0.0)};
    for (std::size_t row = 0; row < rows; ++row) {
        double* x = &w[row * n];
        Grid grid{};
        for (std::size_t j = 0; j < n; ++j) {
            const std::size_t group =
                given.empty() ? j / settings.group_size : static_cast<std::size_t>(given[j]);
            const std::size_t g = row * groups + group;
            const Grid theirs{peer.scales[g], static_cast<double>(peer.zeros[g])};
            if (!given.empty()) {
                grid = theirs;
            } else if (j % settings.group_size == 0) {
                const std::size_t end = std::min(n, j + settings.group_size);
                grid = choose({x + j, x + end}, {&importance[j], &importance[0] + end}, settings, theirs,
                              result.adopted);
                result.scales[g] = grid.scale;
                result.zeros[g] = static_cast<int>(grid.zero);
            }
            const double nearest =
                round_like(x[j] / grid.scale + grid.zero, peer.codes[row * n + j], kBoundary, result.adopted);
            const double code = std::clamp(nearest, 0.0, top);
            result.codes[row * n + j] = static_cast<int>(code);
            const double error = (x[j] - grid.scale * (code - grid.zero)) / u(j, j);
            result.loss[row] += error * error;
            for (std::size_t k = j; k < n; ++k) x[k] -= error * u(j, k);
        }
    }
    return result;
}

}  // namespace textbook

namespace quantmill::testing {
namespace {

struct Problem {
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t tokens;
    QuantizationGrid grid;
    double dead_share = 0.0;   // columns whose input is always zero
    double correlation = 0.5;  // of neighbouring columns
    std::string name() const {
        return fmt::format("R={} C={} T={} bits={} group={} {}{}{}{} dead={} correlation={}", rows, columns,
                           tokens, grid.bits, grid.group_size, grid.sym ? "sym" : "asym",
                           grid.search == ScaleSearch::mse       ? " mse"
                           : grid.search == ScaleSearch::hessian ? " hessian"
                                                                 : "",
                           grid.signed_scales ? " signed" : "", grid.bf16_scales ? " bf16" : "", dead_share,
                           correlation);
    }
};

class GptqSolve : public BackendTest {
protected:
    struct Operands {
        std::vector<float> weights;
        std::vector<float> hessian;  // damped, symmetric
    };
    struct Solution {
        std::vector<std::uint8_t> codes;
        std::vector<Half> scales;
        std::vector<std::uint8_t> zeros;
        std::vector<float> loss;
        bool operator==(const Solution&) const = default;
    };

    // Correlated inputs with channels of unequal size, as activations have; the pipeline's damping and
    // treatment of dead columns.
    Operands make_operands(const Problem& p) {
        const auto c = static_cast<std::size_t>(p.columns);
        std::normal_distribution<double> normal;
        std::vector<double> size(c);
        for (double& s : size) s = std::exp(0.5 * normal(random()));
        std::vector<bool> dead(c);
        for (std::size_t j = 0; j < c; ++j) {
            dead[j] = std::uniform_real_distribution<>()(random()) < p.dead_share;
        }
        std::vector<double> h(c * c, 0.0);
        std::vector<double> x(c);
        for (std::int64_t t = 0; t < p.tokens; ++t) {
            double previous = normal(random());
            for (std::size_t j = 0; j < c; ++j) {
                previous = p.correlation * previous +
                           std::sqrt(1 - p.correlation * p.correlation) * normal(random());
                x[j] = dead[j] ? 0.0 : previous * size[j];
            }
            for (std::size_t i = 0; i < c; ++i) {
                for (std::size_t j = 0; j <= i; ++j) {
                    h[i * c + j] += 2.0 / static_cast<double>(p.tokens) * x[i] * x[j];
                }
            }
        }
        Operands operands{normal_weights(p), std::vector<float>(c * c)};
        double mean = 0.0;
        for (std::size_t j = 0; j < c; ++j) {
            if (h[j * c + j] == 0.0) {
                h[j * c + j] = 1.0;
                for (std::int64_t r = 0; r < p.rows; ++r) operands.weights[r * c + j] = 0.0F;
            }
            mean += h[j * c + j] / static_cast<double>(c);
        }
        for (std::size_t i = 0; i < c; ++i) h[i * c + i] += 0.05 * mean;
        for (std::size_t i = 0; i < c; ++i) {
            for (std::size_t j = 0; j <= i; ++j) {
                operands.hessian[i * c + j] = operands.hessian[j * c + i] = static_cast<float>(h[i * c + j]);
            }
        }
        return operands;
    }

    Tensor factor_of(const Problem& p, const Operands& operands) {
        std::vector<float> lower = operands.hessian;
        for (std::int64_t i = 0; i < p.columns; ++i) {  // the upper triangle must not be read
            for (std::int64_t j = i + 1; j < p.columns; ++j) lower[i * p.columns + j] = NAN;
        }
        Tensor factor = upload(lower, {p.columns, p.columns});
        EXPECT_TRUE(backend().reverse_cholesky(factor));
        return factor;
    }

    // With `given`, a group for each column, grids are chosen beforehand, of the columns as they lie, which
    // `importance` weighs.
    Solution solve(const Problem& p, const Operands& operands, std::int64_t first_row, std::int64_t last_row,
                   const std::vector<std::int32_t>& given = {}, const std::vector<float>& importance = {}) {
        const std::int64_t rows = last_row - first_row;
        const Tensor factor = factor_of(p, operands);
        const Tensor weights = upload(operands.weights, {p.rows, p.columns});
        const ConstTensorView mine = weights.view().rows(first_row, last_row);
        const std::int64_t groups = p.grid.groups(p.columns);
        Tensor codes = backend().empty({rows, p.columns}, DType::u8, "codes");
        Tensor scales = backend().empty({rows, groups}, DType::f16, "scales");
        Tensor zeros = backend().empty({rows, groups}, DType::u8, "zeros");
        Tensor loss = backend().empty({rows}, DType::f32, "loss");
        if (given.empty()) {
            backend().gptq_solve(mine, factor, p.grid, {codes, scales, zeros}, loss);
        } else {
            backend().choose_grids(mine, importance, p.grid, {{}, scales, zeros});
            backend().gptq_solve_static(mine, factor, given, p.grid, {codes, scales, zeros}, loss);
        }
        return {download<std::uint8_t>(codes), download<Half>(scales), download<std::uint8_t>(zeros),
                download<float>(loss)};
    }

    // Every scale, zero and code must be the textbook's, and every row's loss within 1e-3.
    void check(const Problem& p) {
        SCOPED_TRACE(p.name());
        const Operands operands = make_operands(p);
        compare(p, operands, solve(p, operands, 0, p.rows), {});
    }

    // The same of groups whose grids are chosen from the original weights and whose columns lie anywhere.
    void check_static(const Problem& p) {
        SCOPED_TRACE(p.name() + " static");
        const Operands operands = make_operands(p);
        std::vector<std::int32_t> given;
        for (std::int64_t j = 0; j < p.columns; ++j)
            given.push_back(static_cast<std::int32_t>(j / p.grid.group_size));
        std::shuffle(given.begin(), given.end(), random());
        std::vector<float> importance;
        for (std::int64_t j = 0; j < p.columns; ++j)
            importance.push_back(std::exp(std::normal_distribution<float>()(random())));
        const Solution ours = solve(p, operands, 0, p.rows, given, importance);
        compare_grids(p, operands, ours, importance);
        compare(p, operands, ours, given);
    }

    // Ties must stay rare, else adopting them would hide errors.
    void expect_few_ties() const { EXPECT_LT(adopted_, decisions_ / 1000 + 2) << decisions_; }

private:
    static textbook::Settings settings_of(const QuantizationGrid& grid) {
        return {grid.bits,
                static_cast<std::size_t>(grid.group_size),
                grid.sym,
                grid.search == ScaleSearch::mse       ? textbook::Measure::power
                : grid.search == ScaleSearch::hessian ? textbook::Measure::weighted
                                                      : textbook::Measure::range,
                grid.signed_scales,
                grid.bf16_scales ? 8 : 11};
    }

    void compare(const Problem& p, const Operands& operands, const Solution& ours,
                 const std::vector<std::int32_t>& given) {
        const auto columns = static_cast<std::size_t>(p.columns);
        const textbook::Solution peer = as_textbook(ours);
        const textbook::Solution expected =
            textbook::gptq({operands.weights.begin(), operands.weights.end()},
                           {operands.hessian.begin(), operands.hessian.end()},
                           static_cast<std::size_t>(p.rows), columns, settings_of(p.grid), peer, given);
        ASSERT_EQ(peer.scales, expected.scales);
        ASSERT_EQ(peer.zeros, expected.zeros);
        for (std::size_t i = 0; i < peer.codes.size(); ++i) {
            ASSERT_EQ(peer.codes[i], expected.codes[i]) << "row " << i / columns << " column " << i % columns;
        }
        for (std::size_t row = 0; row < peer.loss.size(); ++row) {
            ASSERT_NEAR(peer.loss[row], expected.loss[row], 1e-3 * expected.loss[row] + 1e-12)
                << "row " << row;
        }
        decisions_ += peer.codes.size();
        adopted_ += expected.adopted;
    }

    // Scales and zeros must be those of the original weights.
    void compare_grids(const Problem& p, const Operands& operands, const Solution& ours,
                       const std::vector<float>& importance) {
        const textbook::Solution peer = as_textbook(ours);
        const auto groups = static_cast<std::size_t>(p.grid.groups(p.columns));
        for (std::size_t i = 0; i < peer.scales.size(); ++i) {
            const std::int64_t first = static_cast<std::int64_t>(i % groups) * p.grid.group_size;
            const std::int64_t last = std::min(first + p.grid.group_size, p.columns);
            const float* row = operands.weights.data() + static_cast<std::int64_t>(i / groups) * p.columns;
            const textbook::Grid theirs{peer.scales[i], static_cast<double>(peer.zeros[i])};
            const textbook::Grid grid = textbook::choose(
                {row + first, row + last}, {importance.begin() + first, importance.begin() + last},
                settings_of(p.grid), theirs, adopted_);
            ASSERT_EQ(theirs.scale, grid.scale) << "row " << i / groups << " group " << i % groups;
            ASSERT_EQ(theirs.zero, grid.zero) << "row " << i / groups << " group " << i % groups;
        }
    }

    static textbook::Solution as_textbook(const Solution& ours) {
        textbook::Solution result{{ours.codes.begin(), ours.codes.end()},
                                  {},
                                  {ours.zeros.begin(), ours.zeros.end()},
                                  {ours.loss.begin(), ours.loss.end()}};
        for (const Half scale : ours.scales) result.scales.push_back(double{to_float(scale)});
        return result;
    }

    std::vector<float> normal_weights(const Problem& p) {
        std::normal_distribution<float> normal(0.0F, 0.05F);
        std::vector<float> weights(static_cast<std::size_t>(p.rows * p.columns));
        for (float& w : weights) w = normal(random());
        return weights;
    }

    std::size_t decisions_ = 0;
    std::size_t adopted_ = 0;
};

TEST_P(GptqSolve, EqualsTheTextbookForAllGridsAndGroupSizes) {
    SCOPED_TRACE(trace());
    for (const int bits : {2, 3, 4, 8}) {
        for (const bool sym : {true, false}) {
            for (const std::int64_t group : {16, 32, 64, 128, 256}) {
                check({integer(1, 150), 256, 600, {bits, group, sym}});
                if (HasFailure()) return;
            }
        }
    }
    expect_few_ties();
}

TEST_P(GptqSolve, EqualsTheTextbookWhereGroupsAndBlocksDoNotDivideTheWidth) {
    SCOPED_TRACE(trace());
    for (const bool sym : {true, false}) {
        check({70, 200, 500, {4, 64, sym}});  // a short last group
        check({70, 300, 700, {3, 128, sym}});
        check({20, 700, 900, {4, 256, sym}});  // groups wider than a block of columns
        check({10, 1100, 1300, {4, 512, sym}});
        check({30, 333, 700, {4, 333, sym}});   // one group a row
        check({64, 129, 300, {2, 1024, sym}});  // a group wider than the tensor
        check({65, 300, 700, {4, 100, sym}});   // groups across the blocks' borders
        check({65, 150, 400, {3, 7, sym}});
    }
}

TEST_P(GptqSolve, EqualsTheTextbookForOneRowAndOneColumn) {
    SCOPED_TRACE(trace());
    for (const int bits : {2, 3, 4, 8}) {
        for (const bool sym : {true, false}) {
            check({1, 256, 500, {bits, 64, sym}});
            check({100, 1, 50, {bits, 128, sym}});
            check({1, 1, 50, {bits, 1, sym}});
            check({64, 2, 50, {bits, 1, sym}});
        }
    }
}

TEST_P(GptqSolve, EqualsTheTextbookWithDeadColumns) {
    SCOPED_TRACE(trace());
    for (const bool sym : {true, false}) {
        check({40, 192, 500, {4, 32, sym}, 0.2});
        check({40, 192, 500, {3, 16, sym}, 0.9});  // whole groups of zeros
        check({40, 64, 500, {4, 64, sym}, 1.1});   // nothing but zeros
    }
}

TEST_P(GptqSolve, EqualsTheTextbookForRankDeficientHessians) {
    SCOPED_TRACE(trace());
    for (const bool sym : {true, false}) {
        check({50, 256, 60, {4, 64, sym}});
        check({50, 300, 299, {3, 128, sym}});
        check({50, 200, 1, {4, 64, sym}});
        check({50, 256, 100, {2, 32, sym}, 0.1, 0.9});
    }
}

TEST_P(GptqSolve, EqualsTheTextbookOnRandomProblems) {
    SCOPED_TRACE(trace());
    const std::vector<int> bits{2, 3, 4, 8};
    const std::vector<std::int64_t> groups{16, 32, 64, 128, 256, 512, 1024};
    for (int problem = 0; problem < 60; ++problem) {
        const std::int64_t columns = integer(1, 300);
        const QuantizationGrid grid{bits[integer(0, 3)], groups[integer(0, 6)], integer(0, 1) == 1};
        check({integer(1, 130), columns, integer(1, 2 * columns), grid,
               0.3 * static_cast<double>(integer(0, 1)), 0.1 * static_cast<double>(integer(0, 9))});
        if (HasFailure()) return;
    }
    expect_few_ties();
}

// All searches of all grids that are possible.
std::vector<QuantizationGrid> searched_grids(std::int64_t group_size) {
    std::vector<QuantizationGrid> grids;
    for (const int bits : {2, 3, 4, 8}) {
        for (const ScaleSearch search : {ScaleSearch::minmax, ScaleSearch::mse, ScaleSearch::hessian}) {
            for (const bool bf16 : {false, true}) {
                grids.push_back({bits, group_size, false, search, false, bf16});
                grids.push_back({bits, group_size, true, search, false, bf16});
                grids.push_back({bits, group_size, true, search, true, bf16});
            }
        }
    }
    return grids;
}

TEST_P(GptqSolve, EqualsTheTextbookForAllScaleSearches) {
    SCOPED_TRACE(trace());
    for (const std::int64_t group_size : {16, 50, 160}) {  // inside blocks, not dividing, across blocks
        for (const QuantizationGrid& grid : searched_grids(group_size)) {
            check({integer(1, 8), integer(130, 180), 300, grid, 0.1 * static_cast<double>(integer(0, 2))});
            if (HasFailure()) return;
        }
    }
    expect_few_ties();
}

TEST_P(GptqSolve, EqualsTheTextbookForStaticGroups) {
    SCOPED_TRACE(trace());
    for (const QuantizationGrid& grid : searched_grids(integer(8, 64))) {
        check_static(
            {integer(1, 20), integer(130, 180), 300, grid, 0.1 * static_cast<double>(integer(0, 2))});
        if (HasFailure()) return;
    }
    check_static({1, 256, 400, {4, 64, true, ScaleSearch::hessian, true}});
    check_static({70, 1, 20, {4, 1, true, ScaleSearch::mse, true}});
    check_static({70, 40, 20, {4, 128, false, ScaleSearch::hessian}});
    expect_few_ties();
}

TEST_P(GptqSolve, SearchesOneRowAndOneColumn) {
    SCOPED_TRACE(trace());
    for (const QuantizationGrid& grid : searched_grids(128)) {
        check({1, 60, 100, grid});
        check({5, 1, 50, grid});
        check({2, 30, 50, grid, 1.1});  // nothing but zeros
    }
}

TEST_P(GptqSolve, RowsSplitAtTheRowBlockGiveTheSameBytes) {
    SCOPED_TRACE(trace());
    const Problem p{200, 300, 600, {4, 64, true}};
    const Operands operands = make_operands(p);
    const Solution whole = solve(p, operands, 0, p.rows);
    Solution pieces;
    for (std::int64_t begin = 0; begin < p.rows;) {
        const std::int64_t end = std::min(p.rows, begin + kSolveRowBlock * (begin == 0 ? 1 : 2));
        const Solution piece = solve(p, operands, begin, end);
        pieces.codes.insert(pieces.codes.end(), piece.codes.begin(), piece.codes.end());
        pieces.scales.insert(pieces.scales.end(), piece.scales.begin(), piece.scales.end());
        pieces.zeros.insert(pieces.zeros.end(), piece.zeros.begin(), piece.zeros.end());
        pieces.loss.insert(pieces.loss.end(), piece.loss.begin(), piece.loss.end());
        begin = end;
    }
    EXPECT_EQ(whole, pieces);
}

TEST_P(GptqSolve, ThreadsDoNotChangeABit) {
    SCOPED_TRACE(trace());
    const Problem p{200, 600, 900, {4, 256, false}};
    const Operands operands = make_operands(p);
    expect_same_with_any_threads([&] { return solve(p, operands, 0, p.rows); });
}

TEST_P(GptqSolve, ScalesStayStorable) {
    const std::vector<float> weights{1e-9F, -1e-9F, 0.0F, 3e6F, -3e6F, 1.0F};  // [2, 3]
    Tensor factor = upload<float>({1, 0, 0, 0, 1, 0, 0, 0, 1}, {3, 3});
    Tensor codes = backend().empty({2, 3}, DType::u8, "codes");
    Tensor scales = backend().empty({2, 1}, DType::f16, "scales");
    Tensor zeros = backend().empty({2, 1}, DType::u8, "zeros");
    Tensor loss = backend().empty({2}, DType::f32, "loss");
    for (const bool sym : {true, false}) {
        backend().gptq_solve(upload(weights, {2, 3}), factor, {4, 3, sym}, {codes, scales, zeros}, loss);
        const auto stored = download<Half>(scales);
        EXPECT_EQ(to_float(stored[0]), 0x1p-14F);
        EXPECT_EQ(to_float(stored[1]), 65504.0F);
        for (const std::uint8_t code : download<std::uint8_t>(codes)) EXPECT_LE(code, 15);
    }
}

TEST_P(GptqSolve, RefusesShapesThatDoNotFit) {
    Tensor factor = upload(std::vector<float>(9, 1.0F), {3, 3});
    Tensor weights = upload(std::vector<float>(8, 1.0F), {2, 4});
    Tensor codes = backend().empty({2, 4}, DType::u8, "codes");
    Tensor scales = backend().empty({2, 1}, DType::f16, "scales");
    Tensor zeros = backend().empty({2, 1}, DType::u8, "zeros");
    Tensor loss = backend().empty({2}, DType::f32, "loss");
    EXPECT_THROW(backend().gptq_solve(weights, factor, {4, 4, true}, {codes, scales, zeros}, loss),
                 InternalError);
    EXPECT_THROW(backend().choose_grids(weights, {}, {4, 2, true}, {codes, scales, zeros}), InternalError);
    Tensor square = upload(std::vector<float>(16, 1.0F), {4, 4});
    for (const auto& groups : {std::vector<std::int32_t>{0, 0, 0}, {0, 0, 0, 1}, {0, 0, -1, 0}}) {
        EXPECT_THROW(
            backend().gptq_solve_static(weights, square, groups, {4, 4, true}, {codes, scales, zeros}, loss),
            InternalError);
    }
}

INSTANTIATE_TEST_SUITE_P(Backends, GptqSolve, ::testing::ValuesIn(built_backends()), backend_name);

}  // namespace
}  // namespace quantmill::testing
