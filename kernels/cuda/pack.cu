#include <cstdint>
#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/convert.cuh"
#include "kernels/cuda/launch.h"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 32;  // codes of a row that fill kBits whole words

struct alignas(16) Run {
    std::uint8_t code[kRun];
};

// kRun neighbouring columns a thread: 8 where rows are whole runs of eight, else 1.
template <int kRun, class T>
__global__ void dequantize_kernel(const std::uint8_t* codes, const __half* scales, const std::uint8_t* zeros,
                                  const std::int32_t* g_idx, std::int64_t columns, std::int64_t groups,
                                  T* out) {
    struct alignas(kRun) Codes {
        std::uint8_t value[kRun];
    };
    struct alignas(kRun * sizeof(T) < 16 ? kRun * sizeof(T) : 16) Values {
        T value[kRun];
    };
    const std::int64_t row = blockIdx.x;
    const __half* row_scales = scales + row * groups;
    const std::uint8_t* row_zeros = zeros + row * groups;
    for (std::int64_t c = threadIdx.x * kRun; c < columns; c += kThreads * kRun) {
        const Codes in = *reinterpret_cast<const Codes*>(codes + row * columns + c);
        Values result;
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
            const std::int32_t group = g_idx[c + e];
            const int steps = static_cast<int>(in.value[e]) - static_cast<int>(row_zeros[group]);
            result.value[e] = from_float<T>(to_float(row_scales[group]) * static_cast<float>(steps));
        }
        *reinterpret_cast<Values*>(out + row * columns + c) = result;
    }
}

// A thread owns 32 codes of one row. Neighbouring threads own neighbouring rows, so the words are
// coalesced and the codes are read in whole 32-byte sectors.
template <int kBits>
__global__ void pack_kernel(const std::uint8_t* codes, std::int64_t rows, std::int64_t columns,
                            std::int32_t* packed) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= rows) return;
    const std::int64_t run = blockIdx.y;
    const Run in = *reinterpret_cast<const Run*>(codes + row * columns + run * kRun);
    std::uint32_t words[kBits] = {};
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        const int bit = i * kBits;
        words[bit / 32] |= static_cast<std::uint32_t>(in.code[i]) << (bit % 32);
        if (bit % 32 + kBits > 32) {
            words[bit / 32 + 1] |= static_cast<std::uint32_t>(in.code[i]) >> (32 - bit % 32);
        }
    }
#pragma unroll
    for (int w = 0; w < kBits; ++w) {
        packed[(run * kBits + w) * rows + row] = static_cast<std::int32_t>(words[w]);
    }
}

template <int kBits>
__global__ void unpack_kernel(const std::int32_t* packed, std::int64_t rows, std::int64_t columns,
                              std::uint8_t* codes) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (row >= rows) return;
    const std::int64_t run = blockIdx.y;
    std::uint32_t words[kBits];
#pragma unroll
    for (int w = 0; w < kBits; ++w) {
        words[w] = static_cast<std::uint32_t>(packed[(run * kBits + w) * rows + row]);
    }
    Run out;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
        const int bit = i * kBits;
        std::uint32_t code = words[bit / 32] >> (bit % 32);
        if (bit % 32 + kBits > 32) code |= words[bit / 32 + 1] << (32 - bit % 32);
        out.code[i] = static_cast<std::uint8_t>(code & ((1U << kBits) - 1));
    }
    *reinterpret_cast<Run*>(codes + row * columns + run * kRun) = out;
}

// Calls function with a compile-time number of bits, so that all shifts are constants.
template <int kBits = 1, class Function>
void with_bits(int bits, Function function) {
    if constexpr (kBits <= 8) {
        if (bits == kBits) {
            function(std::integral_constant<int, kBits>{});
        } else {
            with_bits<kBits + 1>(bits, function);
        }
    }
}

dim3 grid_for(std::int64_t rows, std::int64_t columns) {
    return {static_cast<unsigned>(divide_up(rows, kThreads)), static_cast<unsigned>(columns / kRun)};
}

}  // namespace

void dequantize(const std::uint8_t* codes, const void* scales, const std::uint8_t* zeros,
                const std::int32_t* g_idx, std::int64_t rows, std::int64_t columns, std::int64_t groups,
                DType dtype, void* out, cudaStream_t stream) {
    if (rows == 0) return;
    const dim3 grid(static_cast<unsigned>(rows));
    with_float_type(dtype, [&](auto type) {
        using T = decltype(type);
        const bool runs = columns % 8 == 0 && reinterpret_cast<std::uintptr_t>(codes) % 8 == 0 &&
                          reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
        const auto kernel = runs ? dequantize_kernel<8, T> : dequantize_kernel<1, T>;
        kernel<<<grid, kThreads, 0, stream>>>(codes, static_cast<const __half*>(scales), zeros, g_idx,
                                              columns, groups, static_cast<T*>(out));
    });
    check_launch("dequantize_kernel", grid, kThreads);
}

void pack(const std::uint8_t* codes, std::int64_t rows, std::int64_t columns, int bits, std::int32_t* packed,
          cudaStream_t stream) {
    const dim3 grid = grid_for(rows, columns);
    with_bits(bits, [&](auto constant) {
        pack_kernel<decltype(constant)::value><<<grid, kThreads, 0, stream>>>(codes, rows, columns, packed);
    });
    check_launch("pack_kernel", grid, kThreads);
}

void unpack(const std::int32_t* packed, std::int64_t rows, std::int64_t columns, int bits,
            std::uint8_t* codes, cudaStream_t stream) {
    const dim3 grid = grid_for(rows, columns);
    with_bits(bits, [&](auto constant) {
        unpack_kernel<decltype(constant)::value><<<grid, kThreads, 0, stream>>>(packed, rows, columns, codes);
    });
    check_launch("unpack_kernel", grid, kThreads);
}

}  // namespace quantmill::cuda
