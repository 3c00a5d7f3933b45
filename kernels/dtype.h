#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace quantmill {

// Element types of tensors in memory. File formats may know more; they are decoded on reading.
enum class DType : std::uint8_t { f64, f32, f16, bf16, i64, i32, u8 };

constexpr std::size_t size_of(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::i64: return 8;
        case DType::f32:
        case DType::i32: return 4;
        case DType::f16:
        case DType::bf16: return 2;
        case DType::u8: return 1;
    }
    return 0;
}

constexpr std::string_view name_of(DType dtype) {
    switch (dtype) {
        case DType::f64: return "f64";
        case DType::f32: return "f32";
        case DType::f16: return "f16";
        case DType::bf16: return "bf16";
        case DType::i64: return "i64";
        case DType::i32: return "i32";
        case DType::u8: return "u8";
    }
    return "?";
}

// Storage-only 16-bit floats; kernels/half.h converts them.
struct Half {
    std::uint16_t bits;
    friend bool operator==(Half, Half) = default;
};
struct BFloat16 {
    std::uint16_t bits;
    friend bool operator==(BFloat16, BFloat16) = default;
};

template <class T>
inline constexpr DType dtype_of = T::not_an_element_type;
template <>
inline constexpr DType dtype_of<std::uint8_t> = DType::u8;
template <>
inline constexpr DType dtype_of<double> = DType::f64;
template <>
inline constexpr DType dtype_of<float> = DType::f32;
template <>
inline constexpr DType dtype_of<Half> = DType::f16;
template <>
inline constexpr DType dtype_of<BFloat16> = DType::bf16;
template <>
inline constexpr DType dtype_of<std::int64_t> = DType::i64;
template <>
inline constexpr DType dtype_of<std::int32_t> = DType::i32;

}  // namespace quantmill
