#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/dtype.h"

namespace quantmill::cuda {

template <class T>
__device__ float to_float(T value) {
    return static_cast<float>(value);
}

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Eight neighbours, moved by one or two 16-byte accesses.
template <class T>
struct alignas(sizeof(T) * 8 < 16 ? sizeof(T) * 8 : 16) Eight {
    T value[8];
};

// Calls function with a value of the device's type for f32, f16 or bf16.
template <class Function>
void with_float_type(DType dtype, Function function) {
    if (dtype == DType::f32) return function(float{});
    if (dtype == DType::f16) return function(__half{});
    function(__nv_bfloat16{});
}

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace quantmill::cuda
