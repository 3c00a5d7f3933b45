#include "kernels/cpu/scale_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/vector_math.h"
#include "kernels/grid.h"

namespace quantmill {
namespace {

constexpr std::int64_t kRows = kRowLanes;

struct RangeLanes {
    float low[kRows] = {};  // a range that includes 0, for symmetric grids too
    float high[kRows] = {};
};

QUANTMILL_HOT_LOOP void widen_range(const float* weights, std::int64_t count, float* low, float* high) {
    for (std::int64_t j = 0; j < count; ++j) {
        for (std::int64_t r = 0; r < kRows; ++r) {
            low[r] = std::min(low[r], weights[j * kRows + r]);
            high[r] = std::max(high[r], weights[j * kRows + r]);
        }
    }
}

// A candidate of every row.
struct Candidate {
    GridLanes grid;
    float inverse[kRows];
    float loss[kRows];
};

// What is left of a weight on a grid.
inline float miss(float weight, float scale, float inverse, float zero, float max_code) {
    return weight - scale * round_half_even(std::clamp(weight * inverse, -zero, max_code - zero));
}

QUANTMILL_HOT_LOOP void squared_loss(const float* weights, std::int64_t width, const float* importance,
                                     float max_code, Candidate& c) {
    for (std::int64_t j = 0; j < width; ++j) {
        const float weight = importance[j];
        for (std::int64_t r = 0; r < kRows; ++r) {
            const float error =
                miss(weights[j * kRows + r], c.grid.scale[r], c.inverse[r], c.grid.zero[r], max_code);
            c.loss[r] += error * error * weight;
        }
    }
}

// Σ |error|^2.4, GPTQModel's measure. What is added keeps the logarithm of 0 inside the exponential's range:
// a bound would be a branch and not vectorise.
QUANTMILL_HOT_LOOP void power_loss(const float* weights, std::int64_t width, float max_code, Candidate& c) {
    constexpr float kNothing = 1e-15F;
    for (std::int64_t j = 0; j < width; ++j) {
        for (std::int64_t r = 0; r < kRows; ++r) {
            const float error =
                miss(weights[j * kRows + r], c.grid.scale[r], c.inverse[r], c.grid.zero[r], max_code);
            c.loss[r] += vector_exp_inside(2.4F * vector_log(std::abs(error) + kNothing));
        }
    }
}

class Search {
public:
    Search(const float* weights, std::int64_t width, const float* importance, const QuantizationGrid& grid)
        : weights_(weights), width_(width), importance_(importance), grid_(grid) {
        std::fill_n(least_, kRows, std::numeric_limits<float>::infinity());
    }

    GridLanes run(const RangeLanes& range) {
        const Shrinks shrinks = shrinks_of(grid_.search);
        for (int i = 0; i < shrinks.count; ++i) {
            try_shrinks(range, shrinks, [&](std::int64_t) { return shrinks.coarse(i); });
        }
        int coarse[kRows];
        std::copy_n(best_numerator_, kRows, coarse);
        for (int i = 0; i < 2 * shrinks.around; ++i) {
            try_shrinks(range, shrinks, [&](std::int64_t r) { return shrinks.fine(coarse[r], i); });
        }
        return best_;
    }

private:
    template <class NumeratorOf>
    void try_shrinks(const RangeLanes& range, const Shrinks& shrinks, NumeratorOf numerator_of) {
        int numerators[kRows];
        GroupParameters parameters[kRows];
        for (std::int64_t r = 0; r < kRows; ++r) {
            numerators[r] = numerator_of(r);
            parameters[r] =
                shrunk_parameters(range.low[r], range.high[r], shrinks.share(numerators[r]), grid_);
        }
        consider(parameters, numerators);
        if (!tries_twins(grid_)) return;
        for (std::int64_t r = 0; r < kRows; ++r) {
            parameters[r] = twin_of(parameters[r], range.low[r], shrinks.share(numerators[r]), grid_);
        }
        consider(parameters, numerators);
    }

    // Ties keep the earlier candidate.
    void consider(const GroupParameters* parameters, const int* numerators) {
        const auto max_code = static_cast<float>(grid_.max_code());
        for (std::int64_t r = 0; r < kRows; ++r) {
            tried_.grid.scale[r] = to_float(parameters[r].scale);
            tried_.grid.zero[r] = static_cast<float>(parameters[r].zero);
            tried_.inverse[r] = 1.0F / tried_.grid.scale[r];
            tried_.loss[r] = 0.0F;
        }
        if (grid_.search == ScaleSearch::mse) {
            power_loss(weights_, width_, max_code, tried_);
        } else {
            squared_loss(weights_, width_, importance_, max_code, tried_);
        }
        for (std::int64_t r = 0; r < kRows; ++r) {
            if (!(tried_.loss[r] < least_[r])) continue;
            least_[r] = tried_.loss[r];
            best_.scale[r] = tried_.grid.scale[r];
            best_.zero[r] = tried_.grid.zero[r];
            best_numerator_[r] = numerators[r];
        }
    }

    const float* weights_;
    std::int64_t width_;
    const float* importance_;
    QuantizationGrid grid_;
    Candidate tried_{};
    float least_[kRows];
    GridLanes best_{};
    int best_numerator_[kRows] = {};
};

}  // namespace

GridLanes choose_grid_lanes(const float* weights, std::int64_t width, const float* importance,
                            const QuantizationGrid& grid) {
    RangeLanes range;
    widen_range(weights, width, range.low, range.high);
    if (grid.search != ScaleSearch::minmax) return Search(weights, width, importance, grid).run(range);
    GridLanes lanes;
    for (std::int64_t r = 0; r < kRows; ++r) {
        const GroupParameters parameters = group_parameters(range.low[r], range.high[r], grid);
        lanes.scale[r] = to_float(parameters.scale);
        lanes.zero[r] = static_cast<float>(parameters.zero);
    }
    return lanes;
}

}  // namespace quantmill
