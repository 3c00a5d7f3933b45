#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/convert.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/launch.h"

namespace quantmill::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

__device__ double sum_over_warp(double value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

__device__ float step_at(const RefineRows& rows, std::int64_t row, std::int64_t column) {
    const std::int64_t group = row * rows.groups + column / rows.group_size;
    return static_cast<float>(rows.codes[row * rows.columns + column]) -
           static_cast<float>(rows.zeros[group]);
}

__device__ float scale_at(const RefineRows& rows, std::int64_t row, std::int64_t column) {
    return to_float(static_cast<const __half*>(rows.scales)[row * rows.groups + column / rows.group_size]);
}

constexpr int kMirrorTile = 32;

// A block writes the tile above the diagonal that mirrors tile (blockIdx.y, blockIdx.x) below it.
__global__ void mirror_kernel(float* h, std::int64_t n) {
    __shared__ float tile[kMirrorTile][kMirrorTile + 1];
    if (blockIdx.x > blockIdx.y) return;
    const std::int64_t top = std::int64_t{blockIdx.y} * kMirrorTile;
    const std::int64_t left = std::int64_t{blockIdx.x} * kMirrorTile;
    for (int i = static_cast<int>(threadIdx.y); i < kMirrorTile; i += static_cast<int>(blockDim.y)) {
        const std::int64_t row = top + i;
        const std::int64_t column = left + threadIdx.x;
        if (row < n && column < n) tile[i][threadIdx.x] = h[row * n + column];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.y); i < kMirrorTile; i += static_cast<int>(blockDim.y)) {
        const std::int64_t row = left + i;
        const std::int64_t column = top + threadIdx.x;
        if (row < column && column < n) h[row * n + column] = tile[threadIdx.x][i];
    }
}

__global__ void errors_kernel(RefineRows rows, float* errors, float* steps) {
    const std::int64_t element = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (element >= rows.rows * rows.columns) return;
    const std::int64_t row = element / rows.columns;
    const std::int64_t column = element % rows.columns;
    const float step = step_at(rows, row, column);
    errors[element] = rows.weights[element] - scale_at(rows, row, column) * step;
    if (steps != nullptr) steps[element] = step;
}

// A warp a row: sums[row] += Σ errors · products over the columns of products, in double.
__global__ void add_losses_kernel(const float* errors, std::int64_t ld_errors, const float* products,
                                  std::int64_t width, std::int64_t rows, double* sums) {
    const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    if (row >= rows) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    double sum = 0.0;
    for (std::int64_t j = lane; j < width; j += kWarp) {
        sum += double{errors[row * ld_errors + j]} * double{products[row * width + j]};
    }
    sum = sum_over_warp(sum);
    if (lane == 0) sums[row] += sum;
}

__global__ void store_losses_kernel(const double* sums, std::int64_t rows, float* loss) {
    const std::int64_t row = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row < rows) loss[row] = static_cast<float>(fmax(sums[row], 0.0));
}

constexpr int kPieces = kRefineBlock / kWarp;  // columns of a lane: lane, lane + 32, …

// What a lane knows of its columns of one row.
struct LaneColumns {
    float weight[kPieces], error[kPieces], gradient[kPieces], scale[kPieces], zero[kPieces];
    int code[kPieces];
};

__device__ LaneColumns load_columns(const RefineRows& rows, std::int64_t row, std::int64_t first, int width,
                                    const float* errors, const float* gradients) {
    LaneColumns own{};
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
        const int j = lane + q * kWarp;
        if (j >= width) continue;
        const std::int64_t column = first + j;
        own.weight[q] = rows.weights[row * rows.columns + column];
        own.error[q] = errors[row * rows.columns + column];
        own.gradient[q] = gradients[row * kRefineBlock + j];
        own.scale[q] = scale_at(rows, row, column);
        own.zero[q] = static_cast<float>(rows.zeros[row * rows.groups + column / rows.group_size]);
    }
    return own;
}

// A warp walks the block's columns of its row; kernels/cpu/refine.cpp has the reasons. triangle: the
// block's part of H [128][128].
__device__ void walk_row(LaneColumns& own, const float* triangle, int width, float max_code) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
        for (int l = 0; l < kWarp; ++l) {
            const int j = q * kWarp + l;
            if (j >= width) return;
            const float* row = triangle + j * kRefineBlock;
            const float target = own.weight[q] + (own.gradient[q] - own.error[q] * row[j]) / row[j];
            const float bounded = fminf(fmaxf(target / own.scale[q], -own.zero[q]), max_code - own.zero[q]);
            const float step = round_half_even(bounded);
            const float error = own.weight[q] - own.scale[q] * step;
            const float move = __shfl_sync(kAllLanes, error - own.error[q], l);
            if (lane == l) {
                own.error[q] = error;
                own.code[q] = static_cast<int>(step + own.zero[q]);
            }
#pragma unroll
            for (int p = q; p < kPieces; ++p) own.gradient[p] += move * row[lane + p * kWarp];
        }
    }
}

constexpr int kSweepRows = 64;  // of a thread block: its warps take turns

__global__ void __launch_bounds__(kThreads)
    sweep_kernel(RefineRows rows, const float* hessian, std::int64_t first, int width, const float* gradients,
                 float* errors) {
    extern __shared__ float triangle[];
    for (int i = static_cast<int>(threadIdx.x); i < kRefineBlock * kRefineBlock; i += kThreads) {
        const int row = i / kRefineBlock;
        const int column = i % kRefineBlock;
        const bool inside = row < width && column < width;
        triangle[i] = inside ? hessian[(first + row) * rows.columns + first + column] : 0.0F;
    }
    __syncthreads();
    const std::int64_t begin = std::int64_t{blockIdx.x} * kSweepRows;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int turn = static_cast<int>(threadIdx.x) / kWarp; turn < kSweepRows; turn += kWarps) {
        const std::int64_t row = begin + turn;
        if (row >= rows.rows) return;
        LaneColumns own = load_columns(rows, row, first, width, errors, gradients);
        walk_row(own, triangle, width, rows.max_code);
#pragma unroll
        for (int q = 0; q < kPieces; ++q) {
            const int j = lane + q * kWarp;
            if (j >= width) continue;
            errors[row * rows.columns + first + j] = own.error[q];
            rows.codes[row * rows.columns + first + j] = static_cast<std::uint8_t>(own.code[q]);
        }
    }
}

// A warp a row and group: out[row · step] = Σ steps · products over the group's columns.
__global__ void dot_groups_kernel(RefineRows rows, const float* steps, std::int64_t begin, std::int64_t end,
                                  const float* products, std::int64_t groups, double* out,
                                  std::int64_t row_step) {
    const std::int64_t pair = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    if (pair >= rows.rows * groups) return;
    const std::int64_t row = pair / groups;
    const std::int64_t group = pair % groups;
    const std::int64_t width = end - begin;
    const std::int64_t from = group * rows.group_size;
    const std::int64_t to = from + rows.group_size < width ? from + rows.group_size : width;
    double sum = 0.0;
    for (std::int64_t j = from + threadIdx.x % kWarp; j < to; j += kWarp) {
        sum += double{steps[row * rows.columns + begin + j]} * double{products[row * width + j]};
    }
    sum = sum_over_warp(sum);
    if (threadIdx.x % kWarp == 0) out[row * row_step + group] = sum;
}

static_assert(kRefitGroups == kWarp, "a lane holds a row of the system of one row's scales");

// Lane i holds row i of a; afterwards x_i of a · x = b. kernels/cpu/refine.cpp, solve_positive.
__device__ double solve_positive(double (&a)[kWarp], double b) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int k = 0; k < kWarp; ++k) {
        const double pivot = __shfl_sync(kAllLanes, a[k], k);
        const double root = sqrt(fmax(pivot, 1e-300));
        a[k] = lane >= k ? a[k] / root : 0.0;
#pragma unroll
        for (int j = k + 1; j < kWarp; ++j) a[j] -= a[k] * __shfl_sync(kAllLanes, a[k], j);
    }
    double own = b;
#pragma unroll
    for (int k = 0; k < kWarp; ++k) {
        const double y = __shfl_sync(kAllLanes, own / a[k], k);
        own = lane == k ? y : (lane > k ? own - a[k] * y : own);
    }
#pragma unroll
    for (int k = kWarp - 1; k >= 0; --k) {
        const double known = sum_over_warp(lane > k ? a[k] * own : 0.0);
        const double x = (own - known) / a[k];
        own = lane == k ? x : own;
    }
    return own;
}

// A warp a row: the scales of groups [first, first + count).
__global__ void move_scales_kernel(RefineRows rows, std::int64_t first, int count, const double* a,
                                   const double* b, bool bf16_scales) {
    const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    if (row >= rows.rows) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const bool mine = lane < count;
    double matrix[kWarp];
    double largest = 0.0;
#pragma unroll
    for (int j = 0; j < kWarp; ++j) {
        matrix[j] = mine && j < count ? a[(row * kRefitGroups + j) * kRefitGroups + lane] : 0.0;
        if (lane == j) largest = matrix[j];
    }
    const double own_square = largest;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        largest = fmax(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    }
#pragma unroll
    for (int j = 0; j < kWarp; ++j) {
        if (lane == j) matrix[j] += mine ? 1e-9 * largest + 1e-300 : 1.0;
    }
    const double right = mine ? b[row * kRefitGroups + lane] : 0.0;
    double change = solve_positive(matrix, right);

    auto* scales = static_cast<__half*>(rows.scales) + row * rows.groups + first;
    const float scale = mine ? to_float(scales[lane]) : 1.0F;
    const double wanted = double{scale} + change;
    const bool keeps = !mine || own_square <= 0.0 || !isfinite(wanted) || (wanted > 0.0) != (scale > 0.0F);
    const float size = storable_scale(static_cast<float>(fabs(keeps ? 1.0 : wanted)), bf16_scales);
    change = keeps ? 0.0 : double{copysignf(size, scale)} - double{scale};

    double product = 0.0;
#pragma unroll
    for (int j = 0; j < kWarp; ++j) {
        const double other = __shfl_sync(kAllLanes, change, j);
        if (mine && j < count) product += a[(row * kRefitGroups + j) * kRefitGroups + lane] * other;
    }
    const double added = sum_over_warp(change * (product - 2.0 * right));
    if (mine && added < 0.0) {
        scales[lane] = from_float<__half>(static_cast<float>(double{scale} + change));
    }
}

unsigned blocks_for(std::int64_t items, std::int64_t each) {
    return static_cast<unsigned>(divide_up(items, each));
}

}  // namespace

void mirror_triangle(float* h, std::int64_t n, cudaStream_t stream) {
    const unsigned tiles = blocks_for(n, kMirrorTile);
    const dim3 grid(tiles, tiles);
    const dim3 block(kMirrorTile, 8);
    mirror_kernel<<<grid, block, 0, stream>>>(h, n);
    check_launch("mirror_kernel", grid, kMirrorTile * 8);
}

void refine_errors(const RefineRows& rows, float* errors, float* steps, cudaStream_t stream) {
    const dim3 grid(blocks_for(rows.rows * rows.columns, kThreads));
    errors_kernel<<<grid, kThreads, 0, stream>>>(rows, errors, steps);
    check_launch("errors_kernel", grid, kThreads);
}

void add_losses(const float* errors, std::int64_t ld_errors, const float* products, std::int64_t width,
                std::int64_t rows, double* sums, cudaStream_t stream) {
    const dim3 grid(blocks_for(rows, kWarps));
    add_losses_kernel<<<grid, kThreads, 0, stream>>>(errors, ld_errors, products, width, rows, sums);
    check_launch("add_losses_kernel", grid, kThreads);
}

void store_losses(const double* sums, std::int64_t rows, float* loss, cudaStream_t stream) {
    const dim3 grid(blocks_for(rows, kThreads));
    store_losses_kernel<<<grid, kThreads, 0, stream>>>(sums, rows, loss);
    check_launch("store_losses_kernel", grid, kThreads);
}

void sweep_block(const RefineRows& rows, const float* hessian, std::int64_t first, int width,
                 const float* gradients, float* errors, cudaStream_t stream) {
    constexpr int kBytes = kRefineBlock * kRefineBlock * static_cast<int>(sizeof(float));
    check(cudaFuncSetAttribute(sweep_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "cudaFuncSetAttribute for a sweep", {{"shared bytes", kBytes}});
    const dim3 grid(blocks_for(rows.rows, kSweepRows));
    sweep_kernel<<<grid, kThreads, kBytes, stream>>>(rows, hessian, first, width, gradients, errors);
    check_launch("sweep_kernel", grid, kThreads);
}

void dot_groups(const RefineRows& rows, const float* steps, std::int64_t begin, std::int64_t end,
                const float* products, std::int64_t groups, double* out, std::int64_t row_step,
                cudaStream_t stream) {
    const dim3 grid(blocks_for(rows.rows * groups, kWarps));
    dot_groups_kernel<<<grid, kThreads, 0, stream>>>(rows, steps, begin, end, products, groups, out,
                                                     row_step);
    check_launch("dot_groups_kernel", grid, kThreads);
}

void move_scales(const RefineRows& rows, std::int64_t first, int count, const double* a, const double* b,
                 bool bf16_scales, cudaStream_t stream) {
    const dim3 grid(blocks_for(rows.rows, kWarps));
    move_scales_kernel<<<grid, kThreads, 0, stream>>>(rows, first, count, a, b, bf16_scales);
    check_launch("move_scales_kernel", grid, kThreads);
}

}  // namespace quantmill::cuda
