#pragma once

#include <cstdint>

namespace quantmill {

// How a group's scale is chosen (docs/quality.md): from its extremes, or as that of the shrinks of that scale
// with the least Σ |s − q|^2.4 (GPTQModel's mse), or the least Σ (s − q)² R_jj², the loss of GPTQ.
enum class ScaleSearch : std::uint8_t { minmax, mse, hessian };

// Scales that a search tries, the largest first.
struct Shrinks {
    int count, first, whole;  // scale i is (first − i) / whole of the min-max scale
    constexpr float of(int i) const { return static_cast<float>(first - i) / static_cast<float>(whole); }
};
inline constexpr Shrinks kMinMaxShrinks{1, 1, 1};
inline constexpr Shrinks kMseShrinks{80, 100, 100};    // GPTQModel's: 1.00 … 0.21
inline constexpr Shrinks kHessianShrinks{33, 42, 40};  // 1.05 … 0.25
inline Shrinks shrinks_of(ScaleSearch search) {
    switch (search) {
        case ScaleSearch::mse: return kMseShrinks;
        case ScaleSearch::hessian: return kHessianShrinks;
        case ScaleSearch::minmax: break;
    }
    return kMinMaxShrinks;
}

}  // namespace quantmill
