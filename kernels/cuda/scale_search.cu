#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/launch.h"

// Grids of groups of any width: a warp a row and group.
namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

template <class Combine>
__device__ float over_warp(float value, Combine combine) {
    for (int offset = 16; offset > 0; offset /= 2) {
        value = combine(value, __shfl_xor_sync(0xFFFFFFFFU, value, offset));
    }
    return value;
}

// A warp searches a grid by itself.
struct Warp {
    static constexpr int kParts = 1;
    __device__ int part() const { return 0; }
    __device__ float sum(float value) const {
        return over_warp(value, [](float a, float b) { return a + b; });
    }
    __device__ Best agree(const Best& best) const { return best; }
};

// The lane's weights of columns [first, last) of a row. `pushed`: S = w + z, whose −z stands in the errors.
struct RowElements {
    const SolveRows& rows;
    std::int64_t row, first, last;
    bool pushed;
    const float* importance;

    __device__ float error(std::int64_t column) const {
        if (rows.exact) return static_cast<const float*>(rows.errors)[row * rows.ld_errors + column];
        const std::int64_t slot = rows.slots.of(column);
        const auto* parts = static_cast<const __nv_bfloat16*>(rows.errors) + row * rows.ld_errors +
                            slot * kSolveSlot + (column - rows.slots.first(slot));
        return to_float(parts[0]) + to_float(parts[2 * kSolveBlock]);
    }
    template <class Function>
    __device__ void each(Function function) const {
#pragma unroll 1
        for (std::int64_t c = first + threadIdx.x % 32; c < last; c += 32) {
            const float weight = rows.weights[row * rows.columns + c];
            function(pushed ? weight - error(c) : weight, importance == nullptr ? 1.0F : importance[c]);
        }
    }
};

__global__ void choose_grids_kernel(SolveRows rows, std::int64_t first_group, std::int64_t count,
                                    const float2* ranges, const float* importance) {
    const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (warp >= rows.rows * count) return;
    const std::int64_t row = warp / count;
    const std::int64_t group = first_group + warp % count;
    const std::int64_t first = group * rows.grid.group_size;
    const RowElements elements{
        rows, row, first, min(first + rows.grid.group_size, rows.columns), ranges != nullptr, importance};
    float2 range = make_float2(0.0F, 0.0F);
    if (ranges != nullptr) {
        range = ranges[row];
    } else {
        elements.each([&](float weight, float) {
            range.x = fminf(range.x, weight);
            range.y = fmaxf(range.y, weight);
        });
        range.x = over_warp(range.x, [](float a, float b) { return fminf(a, b); });
        range.y = over_warp(range.y, [](float a, float b) { return fmaxf(a, b); });
    }
    const Grid grid = rows.grid.search == ScaleSearch::minmax
                          ? group_grid(range.x, range.y, rows.grid)
                          : search_grid(elements, Warp{}, range.x, range.y, rows.grid);
    if (threadIdx.x % 32 == 0) store_grid(rows, row, group, grid);
}

__global__ void importance_kernel(const float* factor, std::int64_t columns, float* importance) {
    const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (c >= columns) return;
    const float diagonal = factor[c * columns + c];
    importance[c] = diagonal * diagonal;
}

}  // namespace

void choose_grids(const SolveRows& rows, std::int64_t first_group, std::int64_t count, const void* ranges,
                  const float* importance, cudaStream_t stream) {
    if (rows.rows * count == 0) return;
    const dim3 grid(static_cast<unsigned>(divide_up(rows.rows * count * 32, kThreads)));
    choose_grids_kernel<<<grid, kThreads, 0, stream>>>(rows, first_group, count,
                                                       static_cast<const float2*>(ranges), importance);
    check_launch("choose_grids_kernel", grid, kThreads);
}

void importance(const float* factor, std::int64_t columns, float* out, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(divide_up(columns, kThreads)));
    importance_kernel<<<grid, kThreads, 0, stream>>>(factor, columns, out);
    check_launch("importance_kernel", grid, kThreads);
}

}  // namespace quantmill::cuda
