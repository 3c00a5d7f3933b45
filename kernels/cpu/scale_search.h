#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"

// The choice of a group's scale for a block of rows (docs/algorithm.md, "Group parameters").
namespace quantmill {

inline constexpr std::int64_t kRowLanes = kSolveRowBlock;  // rows of a block, the lanes of every loop

// The grid of one group for every row of a block, as numbers and as stored.
struct GridLanes {
    float scale[kRowLanes];
    float zero[kRowLanes];
};

// Chooses the grids of a group from its weights [width][64]. importance[width] weighs columns in a search by
// Hessian; other searches do not read it.
GridLanes choose_grid_lanes(const float* weights, std::int64_t width, const float* importance,
                            const QuantizationGrid& grid);

}  // namespace quantmill
