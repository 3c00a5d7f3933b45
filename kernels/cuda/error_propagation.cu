#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/convert.cuh"
#include "kernels/cuda/launch.h"

namespace quantmill::cuda {
namespace {

using bf16 = __nv_bfloat16;
constexpr int kThreads = 256;
constexpr int kBlock = kPropagateBlock;

__global__ void __launch_bounds__(kThreads) subtract_kernel(const bf16* x, std::int64_t count, bf16* from) {
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
         i += stride) {
        from[i] = from_float<bf16>(to_float(from[i]) - to_float(x[i]));
    }
}

// 2^exponent for −1022 … 1023.
__device__ double power_of_two(int exponent) { return __hiloint2double((1023 + exponent) << 20, 0); }

__global__ void __launch_bounds__(kThreads) largest_kernel(const float* d, const std::int32_t* exponents,
                                                           std::int64_t n, unsigned long long* largest) {
    const std::int64_t i = blockIdx.x;
    double mine = 0.0;
    for (std::int64_t j = threadIdx.x; j < n; j += kThreads) {
        const double value =
            fabs(static_cast<double>(d[i * n + j])) * power_of_two(exponents[i] + exponents[j]);
        mine = isnan(value) ? __longlong_as_double(0x7FF0000000000000LL) : fmax(mine, value);
        if (isinf(mine)) break;
    }
    // Doubles that are not negative are ordered as their bits.
    if (mine > 0.0) atomicMax(largest, static_cast<unsigned long long>(__double_as_longlong(mine)));
}

__global__ void __launch_bounds__(kThreads)
    add_full_kernel(const float* __restrict__ d, const std::int32_t* __restrict__ exponents, std::int64_t n,
                    std::int64_t* __restrict__ sum, int* misfits) {
    const std::int64_t i = blockIdx.x;
    bool fits = true;
    for (std::int64_t j = threadIdx.x; j < n; j += kThreads) {
        const double value = static_cast<double>(d[i * n + j]) * power_of_two(exponents[i] + exponents[j]);
        const bool inside = fabs(value) < 0x1p62;  // false for NaN too
        const std::int64_t addend = inside ? __double2ll_rn(value) : 0;
        const std::int64_t before = sum[i * n + j];
        const auto total = static_cast<std::int64_t>(static_cast<std::uint64_t>(before) +
                                                     static_cast<std::uint64_t>(addend));
        fits = fits && inside && ((before ^ total) & (addend ^ total)) >= 0;
        sum[i * n + j] = total;
    }
    if (!fits) atomicAdd(misfits, 1);
}

__global__ void __launch_bounds__(kThreads)
    from_full_kernel(const std::int64_t* __restrict__ sum, const std::int32_t* __restrict__ exponents,
                     double factor, std::int64_t n, float* __restrict__ d) {
    const std::int64_t i = blockIdx.x;
    for (std::int64_t j = threadIdx.x; j < n; j += kThreads) {
        const auto value = static_cast<double>(sum[i * n + j]);
        d[i * n + j] = static_cast<float>(factor * value * power_of_two(-exponents[i] - exponents[j]));
    }
}

__global__ void __launch_bounds__(kThreads)
    split_kernel(const float* source, std::int64_t rows, std::int64_t columns, std::int64_t ld,
                 SplitOrder order, std::int64_t step, std::int64_t ld_out, bf16* out) {
    const std::int64_t row = blockIdx.y;
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= rows || column >= columns) return;
    const float value = source[row * ld + column];
    const bf16 high = from_float<bf16>(value);
    const bf16 low = from_float<bf16>(value - to_float(high));
    bf16* parts = out + row * ld_out + column;
    parts[0] = high;
    parts[step] = order == SplitOrder::high_high_low ? high : low;
    parts[2 * step] = order == SplitOrder::high_high_low ? low : high;
}

// A thread a column of the inverse, from the diagonal up; it reads of the inverse what it wrote.
__global__ void __launch_bounds__(kBlock)
    invert_blocks_kernel(const float* factor, std::int64_t n, float* inverse) {
    extern __shared__ float upper[];  // [kBlock][kBlock]
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlock;
    const int size = static_cast<int>(min(static_cast<std::int64_t>(kBlock), n - first));
    const int j = threadIdx.x;
    for (int i = 0; i < size; ++i) {
        upper[i * kBlock + j] = j > i && j < size ? factor[(first + i) * n + first + j] : 0.0F;
    }
    __syncthreads();
    float* column = inverse + static_cast<std::int64_t>(blockIdx.x) * kBlock * kBlock + j;
    for (int i = kBlock - 1; i >= 0; --i) {
        float sum = i == j ? 1.0F : 0.0F;
        if (j < size && i < j) {
            for (int k = i + 1; k <= j; ++k) sum -= upper[i * kBlock + k] * column[k * kBlock];
        }
        column[i * kBlock] = sum;
    }
}

__global__ void __launch_bounds__(kThreads)
    divide_columns_kernel(const float* factor, std::int64_t columns, float* x) {
    const std::int64_t row = blockIdx.y;
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (column >= columns) return;
    const float root = factor[column * columns + column];
    x[row * columns + column] /= root * root;
}

__global__ void __launch_bounds__(kThreads)
    add_propagated_kernel(const float* weights, const float* moved, const std::int32_t* order,
                          std::int64_t columns, float alpha, float* target) {
    const std::int64_t row = blockIdx.y;
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (column >= columns) return;
    const std::int64_t place = row * columns + (order == nullptr ? column : order[column]);
    target[place] = weights[place] + alpha * moved[row * columns + column];
}

// Launches with rows in grid.y, which ends at 65535: `launch` gets the first row and the grid of each piece.
template <class Launch>
void by_rows(std::int64_t rows, std::int64_t columns, const Launch& launch) {
    constexpr std::int64_t kMost = 65535;
    for (std::int64_t row = 0; row < rows; row += kMost) {
        const std::int64_t count = rows - row < kMost ? rows - row : kMost;
        launch(row, count,
               dim3(static_cast<unsigned>(divide_up(columns, kThreads)), static_cast<unsigned>(count)));
    }
}

}  // namespace

void subtract(const void* x, std::int64_t count, void* from, cudaStream_t stream) {
    constexpr std::int64_t kMostBlocks = 4096;
    const std::int64_t blocks = divide_up(count, kThreads);
    const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
    subtract_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const bf16*>(x), count,
                                                   static_cast<bf16*>(from));
    check_launch("subtract_kernel", grid, kThreads);
}

void largest_fixed_point(const float* d, const std::int32_t* exponents, std::int64_t n, void* largest,
                         cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(n));
    largest_kernel<<<grid, kThreads, 0, stream>>>(d, exponents, n, static_cast<unsigned long long*>(largest));
    check_launch("largest_kernel", grid, kThreads);
}

void add_fixed_point_full(const float* d, const std::int32_t* exponents, std::int64_t n, std::int64_t* sum,
                          int* misfits, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(n));
    add_full_kernel<<<grid, kThreads, 0, stream>>>(d, exponents, n, sum, misfits);
    check_launch("add_full_kernel", grid, kThreads);
}

void from_fixed_point_full(const std::int64_t* sum, const std::int32_t* exponents, double factor,
                           std::int64_t n, float* d, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(n));
    from_full_kernel<<<grid, kThreads, 0, stream>>>(sum, exponents, factor, n, d);
    check_launch("from_full_kernel", grid, kThreads);
}

void split(const float* source, std::int64_t rows, std::int64_t columns, std::int64_t ld, SplitOrder order,
           std::int64_t step, std::int64_t ld_out, void* out, cudaStream_t stream) {
    by_rows(rows, columns, [&](std::int64_t row, std::int64_t count, dim3 grid) {
        split_kernel<<<grid, kThreads, 0, stream>>>(source + row * ld, count, columns, ld, order, step,
                                                    ld_out, static_cast<bf16*>(out) + row * ld_out);
        check_launch("split_kernel", grid, kThreads);
    });
}

void invert_blocks(const float* factor, std::int64_t n, float* inverse, cudaStream_t stream) {
    constexpr int kBytes = kBlock * kBlock * sizeof(float);
    check(cudaFuncSetAttribute(invert_blocks_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "cudaFuncSetAttribute(invert_blocks_kernel)", {{"shared bytes", kBytes}});
    const dim3 grid(static_cast<unsigned>(divide_up(n, kBlock)));
    invert_blocks_kernel<<<grid, kBlock, kBytes, stream>>>(factor, n, inverse);
    check_launch("invert_blocks_kernel", grid, kBlock);
}

void divide_columns(const float* factor, std::int64_t rows, std::int64_t columns, float* x,
                    cudaStream_t stream) {
    by_rows(rows, columns, [&](std::int64_t row, std::int64_t, dim3 grid) {
        divide_columns_kernel<<<grid, kThreads, 0, stream>>>(factor, columns, x + row * columns);
        check_launch("divide_columns_kernel", grid, kThreads);
    });
}

void add_propagated(const float* weights, const float* moved, const std::int32_t* order, std::int64_t rows,
                    std::int64_t columns, float alpha, float* target, cudaStream_t stream) {
    by_rows(rows, columns, [&](std::int64_t row, std::int64_t, dim3 grid) {
        add_propagated_kernel<<<grid, kThreads, 0, stream>>>(weights + row * columns, moved + row * columns,
                                                             order, columns, alpha, target + row * columns);
        check_launch("add_propagated_kernel", grid, kThreads);
    });
}

}  // namespace quantmill::cuda
