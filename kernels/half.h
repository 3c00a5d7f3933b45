#pragma once

#include <bit>
#include <cstdint>

#include "kernels/dtype.h"

namespace quantmill {

inline constexpr float kHalfMax = 65504.0F;
inline constexpr float kHalfSmallestNormal = 6.103515625e-05F;

// IEEE binary16 -> binary32, exact, subnormals, infinities and NaN included.
inline float to_float(Half h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h.bits & 0x8000U) << 16U;
    const std::uint32_t magnitude = h.bits & 0x7FFFU;
    if (magnitude >= 0x7C00U) {  // infinity or NaN
        return std::bit_cast<float>(sign | 0x7F800000U | ((magnitude & 0x3FFU) << 13U));
    }
    // Multiplying by 2^112 rebiases the exponent and normalises subnormals in one exact step.
    const float scaled = std::bit_cast<float>(magnitude << 13U) * 0x1p112F;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
}

// binary32 -> binary16, round to nearest even; values beyond the range become infinity.
inline Half to_half(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const auto sign = static_cast<std::uint16_t>((bits >> 16U) & 0x8000U);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    if (magnitude > 0x7F800000U) return {static_cast<std::uint16_t>(sign | 0x7E00U)};  // NaN
    if (magnitude >= 0x477FF000U) return {static_cast<std::uint16_t>(sign | 0x7C00U)};
    if (magnitude < 0x38800000U) {  // subnormal half: let the addition round to a multiple of 2^-24
        const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
        return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) & 0x7FFU))};
    }
    const std::uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13U) & 1U) - 0x38000000U;
    return {static_cast<std::uint16_t>(sign | (rounded >> 13U))};
}

inline float to_float(BFloat16 b) { return std::bit_cast<float>(static_cast<std::uint32_t>(b.bits) << 16U); }

// binary32 -> bfloat16, round to nearest even, NaN kept quiet.
inline BFloat16 to_bfloat16(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return {static_cast<std::uint16_t>((bits >> 16U) | 0x40U)};
    return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U)};
}

}  // namespace quantmill
