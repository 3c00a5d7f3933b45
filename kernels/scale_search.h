#pragma once

#include <cstdint>

namespace quantmill {

// How a group's scale is chosen (docs/quality.md): from its extremes, or as that of the shrinks of that scale
// with the least Σ |s − q|^2.4 (GPTQModel's mse), or the least Σ (s − q)² R_jj², the loss of GPTQ.
enum class ScaleSearch : std::uint8_t { minmax, mse, hessian };

// Shares of the min-max scale that a search tries, as numerators over `whole`: the coarse ones, the largest
// first, then `around` on each side of the best of these.
struct Shrinks {
    int count, first, step, whole, around;
    constexpr int coarse(int i) const { return first - i * step; }
    constexpr int fine(int best, int i) const { return i % 2 == 0 ? best + i / 2 + 1 : best - i / 2 - 1; }
    constexpr float share(int numerator) const {
        return static_cast<float>(numerator) / static_cast<float>(whole);
    }
};
inline constexpr Shrinks kMinMaxShrinks{1, 1, 1, 1, 0};
inline constexpr Shrinks kMseShrinks{80, 100, 1, 100, 0};   // GPTQModel's: 1.00, 0.99 … 0.21
inline constexpr Shrinks kHessianShrinks{9, 84, 8, 80, 4};  // 1.05, 0.95 … 0.25, then by 1/80
constexpr Shrinks shrinks_of(ScaleSearch search) {
    switch (search) {
        case ScaleSearch::mse: return kMseShrinks;
        case ScaleSearch::hessian: return kHessianShrinks;
        case ScaleSearch::minmax: break;
    }
    return kMinMaxShrinks;
}

}  // namespace quantmill
