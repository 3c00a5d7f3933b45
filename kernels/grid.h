#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/backend.h"
#include "kernels/half.h"

// The scalar rules of the integer grid (docs/algorithm.md), shared by the backends.
namespace quantmill {

struct GroupParameters {
    Half scale;
    int zero;
};

// A positive scale as the file stores it: fp16, never zero or subnormal (some consumers flush those), never
// infinite; or one that bf16 holds as well, with its 8 significant bits.
inline Half storable_scale(float scale, bool bf16) {
    constexpr float kBothMax = 65280.0F;
    scale = std::clamp(scale, kHalfSmallestNormal, bf16 ? kBothMax : kHalfMax);
    return to_half(bf16 ? to_float(to_bfloat16(scale)) : scale);
}

inline Half negated(Half scale) { return {static_cast<std::uint16_t>(scale.bits ^ 0x8000U)}; }

// Rounds half to even for |x| < 2^22, in a form that every instruction set vectorises.
inline float round_half_even(float x) {
    constexpr float kShift = 0x1.8p23F;
    return (x + kShift) - kShift;
}

// Whether each shrink is tried twice: with both signs or, as GPTQModel does for asymmetric grids of 2 bits,
// with both integers next to the ideal zero.
inline bool tries_twins(const QuantizationGrid& grid) {
    return grid.sym ? grid.signed_scales : grid.bits == 2;
}

// Step and zero point for a group whose updated weights lie in [low, high], 0 included, shrunk to a share of
// the min-max scale.
inline GroupParameters shrunk_parameters(float low, float high, float shrink, const QuantizationGrid& grid) {
    const auto max_code = static_cast<float>(grid.max_code());
    if (grid.sym) {
        const float absmax = std::max(-low, high);
        return {storable_scale(shrink * (2.0F * absmax / max_code), grid.bf16_scales), 1 << (grid.bits - 1)};
    }
    const Half scale = storable_scale(shrink * ((high - low) / max_code), grid.bf16_scales);
    // Clamped before rounding: the bounds are integers, and a huge quotient would not round exactly.
    const float zero = std::clamp(-(shrink * low) / to_float(scale), 0.0F, max_code);
    return {scale, static_cast<int>(round_half_even(zero))};
}

// The other candidate of a shrink (tries_twins).
inline GroupParameters twin_of(const GroupParameters& first, float low, float shrink,
                               const QuantizationGrid& grid) {
    if (grid.sym) return {negated(first.scale), first.zero};
    const float ideal = -(shrink * low) / to_float(first.scale);
    const float lower = std::clamp(std::floor(ideal), 0.0F, static_cast<float>(grid.max_code()));
    const float upper = std::clamp(std::ceil(ideal), 0.0F, static_cast<float>(grid.max_code()));
    return {first.scale, static_cast<int>(static_cast<float>(first.zero) == lower ? upper : lower)};
}

// The min-max parameters. A scale with a sign puts the grid's longer side, that of code 0, on the larger
// extreme.
inline GroupParameters group_parameters(float low, float high, const QuantizationGrid& grid) {
    GroupParameters parameters = shrunk_parameters(std::min(low, 0.0F), std::max(high, 0.0F), 1.0F, grid);
    if (grid.sym && grid.signed_scales && high > -low) parameters.scale = negated(parameters.scale);
    return parameters;
}

// The code nearest to value on the grid, as a float: clamp(round(value / scale) + zero, 0, max_code).
inline float quantize(float value, float scale, float zero, float max_code) {
    return round_half_even(std::clamp(value / scale, -zero, max_code - zero)) + zero;
}

}  // namespace quantmill
