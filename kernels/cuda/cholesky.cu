#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/convert.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.cuh"

namespace quantmill::cuda {
namespace {

using bf16 = __nv_bfloat16;
constexpr int kBlock = kCholeskyBlock;

// --- The diagonal block: a 16 x 16 grid of threads, each with an 8 x 8 cyclic share in registers. ---

constexpr int kSide = 16;
constexpr int kShare = kBlock / kSide;

// An ordinary Cholesky of the block with rows and columns reversed, L·Lᵀ, and with the same
// eliminations L⁻¹ out of the identity; reversed back they are R and R⁻¹.
__global__ void __launch_bounds__(kSide* kSide)
    cholesky_block_kernel(float* block, int n, std::int64_t ld, float* inverse, int* failed) {
    __shared__ float columns[2][kBlock];
    __shared__ float rows[2][kBlock];
    const int ti = threadIdx.x % kSide;
    const int tj = threadIdx.x / kSide;
    float a[kShare][kShare];
    float x[kShare][kShare];
#pragma unroll
    for (int u = 0; u < kShare; ++u) {
#pragma unroll
        for (int v = 0; v < kShare; ++v) {
            const int i = ti + kSide * u;
            const int j = tj + kSide * v;
            const int high = n - 1 - min(i, j);
            const int low = n - 1 - max(i, j);
            x[u][v] = i == j ? 1.0F : 0.0F;
            a[u][v] = low >= 0 ? block[high * ld + low] : x[u][v];  // past n: the identity
        }
    }
    bool positive = true;
#pragma unroll
    for (int b = 0; b < kShare; ++b) {
        for (int t = 0; t < kSide; ++t) {
            const int step = b * kSide + t;
            float* column = columns[step % 2];
            float* row = rows[step % 2];
#pragma unroll
            for (int u = 0; u < kShare; ++u) {
                if (tj == t) column[ti + kSide * u] = a[u][b];
                if (ti == t) row[tj + kSide * u] = x[b][u];
            }
            __syncthreads();
            const float pivot = column[step];
            positive = positive && pivot > 0.0F && isfinite(pivot);
            const float scale = 1.0F / sqrtf(pivot);
            float left[kShare];
#pragma unroll
            for (int u = b; u < kShare; ++u) {
                left[u] = column[ti + kSide * u] * scale;
                if (tj == t) a[u][b] = left[u];
            }
            // What is finished stays: columns up to this one, and rows of the inverse up to this one.
#pragma unroll
            for (int v = b; v < kShare; ++v) {
                const float right = v > b || tj > t ? column[tj + kSide * v] * scale : 0.0F;
#pragma unroll
                for (int u = b; u < kShare; ++u) a[u][v] -= left[u] * right;
            }
#pragma unroll
            for (int v = 0; v <= b; ++v) {
                const float top = row[tj + kSide * v] * scale;
                if (ti == t) x[b][v] = top;
#pragma unroll
                for (int u = b; u < kShare; ++u) {
                    x[u][v] -= (u > b || ti > t ? left[u] : 0.0F) * top;
                }
            }
        }
    }
    if (threadIdx.x == 0 && !positive) *failed = 1;
#pragma unroll
    for (int u = 0; u < kShare; ++u) {
#pragma unroll
        for (int v = 0; v < kShare; ++v) {
            const int i = n - 1 - (ti + kSide * u);  // reversed back
            const int j = n - 1 - (tj + kSide * v);
            if (i < 0 || j < 0) continue;
            if (i <= j) block[j * ld + i] = a[u][v];  // Rᵀ
            inverse[j * kBlock + i] = i <= j ? x[u][v] : 0.0F;
        }
    }
}

// --- The panel: 128 rows times 64 columns a thread block. ---

constexpr int kPanelColumns = 64;
constexpr int kPanelThreads = 256;
constexpr int kPanelBytes = (kBlock * kBlock + kBlock * kPanelColumns) * sizeof(float);

struct alignas(8) FourParts {
    bf16 value[4];
};

__global__ void __launch_bounds__(kPanelThreads)
    cholesky_panel_kernel(float* rows, const float* inverse, int n, std::int64_t columns, std::int64_t ld,
                          bf16* left, bf16* right, std::int64_t ld_parts) {
    extern __shared__ __align__(16) float shared[];
    float* transposed = shared;              // R⁻ᵀ [k][i]
    float* tile = shared + kBlock * kBlock;  // [k][64]
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kPanelColumns;
    for (int e = threadIdx.x; e < kBlock * kBlock; e += kPanelThreads) {
        copy_async_4(transposed + e, inverse + e, e % kBlock < n && e / kBlock < n);
    }
    for (int e = threadIdx.x; e < kBlock * kPanelColumns; e += kPanelThreads) {
        const int k = e / kPanelColumns;
        const std::int64_t column = first + e % kPanelColumns;
        const bool valid = k < n && column < columns;
        copy_async_4(tile + e, valid ? rows + k * ld + column : rows, valid);
    }
    wait_for_copies();
    __syncthreads();

    // Rows 4·ty … 4·ty + 3 and the same + 64; columns 4·tx … 4·tx + 3.
    const int ty = threadIdx.x % 16;
    const int tx = threadIdx.x / 16;
    float sum[8][4] = {};
#pragma unroll 4
    for (int k = 0; k < kBlock; ++k) {
        const float4 low = *reinterpret_cast<const float4*>(transposed + k * kBlock + ty * 4);
        const float4 high = *reinterpret_cast<const float4*>(transposed + k * kBlock + 64 + ty * 4);
        const float4 factors = *reinterpret_cast<const float4*>(tile + k * kPanelColumns + tx * 4);
        const float l[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const float r[4] = {factors.x, factors.y, factors.z, factors.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] += l[i] * r[j];
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const std::int64_t column = first + tx * 4 + j;
        if (column >= columns) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            FourParts high;
            FourParts low;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = half * 64 + ty * 4 + i;
                const float value = sum[half * 4 + i][j];
                high.value[i] = from_float<bf16>(value);
                low.value[i] = from_float<bf16>(value - to_float(high.value[i]));
                if (row < n) rows[row * ld + column] = value;
            }
            if (left == nullptr) continue;
            const std::int64_t place = column * ld_parts + half * 64 + ty * 4;
            const auto store = [&](bf16* parts, int part, const FourParts& four) {
                *reinterpret_cast<FourParts*>(parts + place + part * kBlock) = four;
            };
            store(left, 0, high), store(left, 1, high), store(left, 2, low);
            store(right, 0, high), store(right, 1, low), store(right, 2, high);
        }
    }
}

// --- The last pass: 32 x 32 tiles of the lower triangle, transposed into the upper one. ---

constexpr int kTile = 32;
constexpr int kTileRows = 8;

__global__ void cholesky_finish_kernel(float* h, std::int64_t n) {
    __shared__ float tile[kTile][kTile + 1];
    if (blockIdx.x > blockIdx.y) return;
    const int lane = threadIdx.x % kTile;
    const int first = threadIdx.x / kTile;
    const std::int64_t top = static_cast<std::int64_t>(blockIdx.y) * kTile;   // rows that are read
    const std::int64_t left = static_cast<std::int64_t>(blockIdx.x) * kTile;  // columns that are read
    for (int r = first; r < kTile; r += kTileRows) {
        const std::int64_t row = top + r;
        if (row < n && left + lane < n) tile[r][lane] = h[row * n + left + lane] / h[row * n + row];
    }
    __syncthreads();
    for (int r = first; r < kTile; r += kTileRows) {
        const std::int64_t row = left + r;
        const std::int64_t column = top + lane;
        if (column < n && row < column) h[row * n + column] = tile[lane][r];
    }
}

}  // namespace

void cholesky_block(float* block, int n, std::int64_t ld, float* inverse, int* failed, cudaStream_t stream) {
    cholesky_block_kernel<<<1, kSide * kSide, 0, stream>>>(block, n, ld, inverse, failed);
    check_launch("cholesky_block_kernel", 1, kSide * kSide);
}

void cholesky_panel(float* rows, const float* inverse, int n, std::int64_t columns, std::int64_t ld,
                    void* left, void* right, std::int64_t ld_parts, cudaStream_t stream) {
    if (columns == 0) return;
    check(
        cudaFuncSetAttribute(cholesky_panel_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPanelBytes),
        "cudaFuncSetAttribute(cholesky_panel_kernel)", {{"shared bytes", kPanelBytes}});
    const dim3 grid(static_cast<unsigned>(divide_up(columns, kPanelColumns)));
    cholesky_panel_kernel<<<grid, kPanelThreads, kPanelBytes, stream>>>(
        rows, inverse, n, columns, ld, static_cast<bf16*>(left), static_cast<bf16*>(right), ld_parts);
    check_launch("cholesky_panel_kernel", grid, kPanelThreads);
}

void cholesky_finish(float* h, std::int64_t n, cudaStream_t stream) {
    const auto tiles = static_cast<unsigned>(divide_up(n, kTile));
    const dim3 grid(tiles, tiles);
    cholesky_finish_kernel<<<grid, kTile * kTileRows, 0, stream>>>(h, n);
    check_launch("cholesky_finish_kernel", grid, kTile * kTileRows);
}

}  // namespace quantmill::cuda
