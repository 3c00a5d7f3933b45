#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/convert.cuh"
#include "kernels/cuda/launch.h"

// Passes over the triangle of a Hessian; the products themselves are cuBLASLt's (cuda_backend.cpp).
namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void diagonal_kernel(float* h, std::int64_t n, float* diagonal, bool read) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= n) return;
    if (read) {
        diagonal[i] = h[i * n + i];
    } else {
        h[i * n + i] = diagonal[i];
    }
}

// Adds one value; false when it is not finite or leaves the range.
__device__ bool add_value(double value, std::int64_t& sum) {
    if (!(fabs(value) < 0x1p62)) return false;
    const std::int64_t addend = __double2ll_rn(value);
    const auto total =
        static_cast<std::int64_t>(static_cast<std::uint64_t>(sum) + static_cast<std::uint64_t>(addend));
    const bool overflow = ((sum ^ total) & (addend ^ total)) < 0;
    sum = total;
    return !overflow;
}

// 2^exponent for −1022 … 1023.
__device__ double power_of_two(int exponent) { return __hiloint2double((1023 + exponent) << 20, 0); }

// kRows neighbouring rows a thread block: they share the exponents, and independent rows keep memory
// busy. The longest rows start first.
constexpr int kRows = 4;

__global__ void __launch_bounds__(kThreads)
    add_fixed_point_kernel(const float* __restrict__ h, const std::int32_t* __restrict__ exponents,
                           std::int64_t n, std::int64_t* __restrict__ sum, int* misfits) {
    const std::int64_t first = static_cast<std::int64_t>(gridDim.x - 1 - blockIdx.x) * kRows;
    const std::int64_t last = min(first + kRows, n) - 1;
    bool fits = true;
    for (std::int64_t j = threadIdx.x; j <= last; j += kThreads) {
        float values[kRows];
        std::int64_t sums[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const std::int64_t i = first + r;
            const bool inside = i <= last && j <= i;
            values[r] = inside ? h[i * n + j] : 0.0F;
            sums[r] = inside ? sum[i * (i + 1) / 2 + j] : 0;
        }
        const int exponent = exponents[j];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const std::int64_t i = first + r;
            if (i > last || j > i) continue;
            const double value = static_cast<double>(values[r]) * power_of_two(exponents[i] + exponent);
            fits = add_value(value, sums[r]) && fits;
            sum[i * (i + 1) / 2 + j] = sums[r];
        }
    }
    if (!fits) atomicAdd(misfits, 1);
}

__global__ void __launch_bounds__(kThreads)
    from_fixed_point_kernel(const std::int64_t* __restrict__ sum, const std::int32_t* __restrict__ exponents,
                            double factor, std::int64_t n, float* __restrict__ h) {
    const std::int64_t first = static_cast<std::int64_t>(gridDim.x - 1 - blockIdx.x) * kRows;
    const std::int64_t last = min(first + kRows, n) - 1;
    for (std::int64_t j = threadIdx.x; j <= last; j += kThreads) {
        const int exponent = exponents[j];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const std::int64_t i = first + r;
            if (i > last || j > i) continue;
            const auto value = static_cast<double>(sum[i * (i + 1) / 2 + j]);
            h[i * n + j] = static_cast<float>(factor * value * power_of_two(-exponents[i] - exponent));
        }
    }
}

__global__ void permute_symmetric_kernel(const float* source, const std::int32_t* order, std::int64_t n,
                                         float* h) {
    const std::int64_t i = blockIdx.x;
    const std::int64_t p = order[i];
    for (std::int64_t j = threadIdx.x; j <= i; j += kThreads) {
        const std::int64_t q = order[j];
        h[i * n + j] = p > q ? source[p * n + q] : source[q * n + p];
    }
}

}  // namespace

void read_diagonal(const float* h, std::int64_t n, float* diagonal, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(divide_up(n, kThreads)));
    diagonal_kernel<<<grid, kThreads, 0, stream>>>(const_cast<float*>(h), n, diagonal, true);
    check_launch("diagonal_kernel", grid, kThreads);
}

void write_diagonal(const float* diagonal, std::int64_t n, float* h, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(divide_up(n, kThreads)));
    diagonal_kernel<<<grid, kThreads, 0, stream>>>(h, n, const_cast<float*>(diagonal), false);
    check_launch("diagonal_kernel", grid, kThreads);
}

void add_fixed_point(const float* h, const std::int32_t* exponents, std::int64_t n, std::int64_t* sum,
                     int* misfits, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(divide_up(n, kRows)));
    add_fixed_point_kernel<<<grid, kThreads, 0, stream>>>(h, exponents, n, sum, misfits);
    check_launch("add_fixed_point_kernel", grid, kThreads);
}

void from_fixed_point(const std::int64_t* sum, const std::int32_t* exponents, double factor, std::int64_t n,
                      float* h, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(divide_up(n, kRows)));
    from_fixed_point_kernel<<<grid, kThreads, 0, stream>>>(sum, exponents, factor, n, h);
    check_launch("from_fixed_point_kernel", grid, kThreads);
}

void permute_symmetric(const float* source, const std::int32_t* order, std::int64_t n, float* h,
                       cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(n));
    permute_symmetric_kernel<<<grid, kThreads, 0, stream>>>(source, order, n, h);
    check_launch("permute_symmetric_kernel", grid, kThreads);
}

}  // namespace quantmill::cuda
