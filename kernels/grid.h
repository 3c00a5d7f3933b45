#pragma once

#include <algorithm>

#include "kernels/backend.h"
#include "kernels/half.h"

// The scalar rules of the integer grid (docs/algorithm.md), shared by the backends.
namespace quantmill {

struct GroupParameters {
    Half scale;
    int zero;
};

// The scale as the file stores it: fp16, never zero or subnormal (some consumers flush those), never
// infinite.
inline Half storable_scale(float scale) { return to_half(std::clamp(scale, kHalfSmallestNormal, kHalfMax)); }

// The same as the grid stores it: with bf16_scales eight significant bits, which bf16 and fp16 both hold.
inline Half storable_scale(float scale, const QuantizationGrid& grid) {
    const float kept = grid.bf16_scales ? to_float(to_bfloat16(std::min(scale, kHalfMax))) : scale;
    return storable_scale(std::min(kept, grid.bf16_scales ? 65280.0F : kHalfMax));
}

// Rounds half to even for |x| < 2^22, in a form that every instruction set vectorises.
inline float round_half_even(float x) {
    constexpr float kShift = 0x1.8p23F;
    return (x + kShift) - kShift;
}

// Step and zero point for a group whose updated weights lie in [low, high].
inline GroupParameters group_parameters(float low, float high, const QuantizationGrid& grid) {
    const auto max_code = static_cast<float>(grid.max_code());
    if (grid.sym) {
        const float absmax = std::max(-low, high);
        return {storable_scale(2.0F * absmax / max_code), 1 << (grid.bits - 1)};
    }
    low = std::min(low, 0.0F);
    high = std::max(high, 0.0F);
    const Half scale = storable_scale((high - low) / max_code);
    // Clamped before rounding: the bounds are integers, and a huge quotient would not round exactly.
    const float zero = std::clamp(-low / to_float(scale), 0.0F, max_code);
    return {scale, static_cast<int>(round_half_even(zero))};
}

// The code nearest to value on the grid, as a float: clamp(round(value / scale) + zero, 0, max_code).
inline float quantize(float value, float scale, float zero, float max_code) {
    return round_half_even(std::clamp(value / scale, -zero, max_code - zero)) + zero;
}

}  // namespace quantmill
