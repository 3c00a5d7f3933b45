#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/convert.cuh"
#include "kernels/cuda/launch.h"

// Scales and zeros of groups by the same rules as kernels/grid.h, and their search.
namespace quantmill::cuda {

__device__ inline float round_half_even(float x) {
    constexpr float kShift = 0x1.8p23F;
    return __fsub_rn(__fadd_rn(x, kShift), kShift);
}

struct Grid {
    float scale, inverse, zero;
};
__device__ inline Grid make_grid(float scale, float zero) { return {scale, 1.0F / scale, zero}; }

__device__ inline float storable_scale(float scale, bool bf16) {
    constexpr float kHalfMax = 65504.0F;
    constexpr float kBothMax = 65280.0F;
    constexpr float kHalfSmallestNormal = 6.103515625e-05F;
    scale = fminf(fmaxf(scale, kHalfSmallestNormal), bf16 ? kBothMax : kHalfMax);
    if (bf16) scale = to_float(from_float<__nv_bfloat16>(scale));
    return to_float(from_float<__half>(scale));
}

__device__ inline float max_code_of(const SolveGrid& grid) {
    return static_cast<float>((1 << grid.bits) - 1);
}

struct Parameters {
    float scale, zero;
};

// Of a group whose updated weights lie in [low, high], 0 included.
__device__ inline Parameters shrunk_parameters(float low, float high, float shrink, const SolveGrid& grid) {
    const float max_code = max_code_of(grid);
    if (grid.sym) {
        const float scale = storable_scale(shrink * (2.0F * fmaxf(-low, high) / max_code), grid.bf16_scales);
        return {scale, static_cast<float>(1 << (grid.bits - 1))};
    }
    const float scale = storable_scale(shrink * ((high - low) / max_code), grid.bf16_scales);
    return {scale, round_half_even(fminf(fmaxf(-(shrink * low) / scale, 0.0F), max_code))};
}

// The other candidate of a shrink.
__device__ inline Parameters twin_of(const Parameters& first, float low, float shrink,
                                     const SolveGrid& grid) {
    if (grid.sym) return {-first.scale, first.zero};
    const float ideal = -(shrink * low) / first.scale;
    const float lower = fminf(fmaxf(floorf(ideal), 0.0F), max_code_of(grid));
    const float upper = fminf(fmaxf(ceilf(ideal), 0.0F), max_code_of(grid));
    return {first.scale, first.zero == lower ? upper : lower};
}

__device__ inline Grid group_grid(float low, float high, const SolveGrid& grid) {
    const Parameters found = shrunk_parameters(low, high, 1.0F, grid);
    const bool negative = grid.sym && grid.signed_scales && high > -low;
    return make_grid(negative ? -found.scale : found.scale, found.zero);
}

__device__ inline void store_grid(const SolveRows& rows, std::int64_t row, std::int64_t group,
                                  const Grid& grid) {
    static_cast<__half*>(rows.scales)[row * rows.groups + group] = from_float<__half>(grid.scale);
    rows.zeros[row * rows.groups + group] = static_cast<std::uint8_t>(grid.zero);
}

__device__ inline Grid load_grid(const SolveRows& rows, std::int64_t row, std::int64_t group) {
    return make_grid(to_float(static_cast<const __half*>(rows.scales)[row * rows.groups + group]),
                     static_cast<float>(rows.zeros[row * rows.groups + group]));
}

// --- The search. A thread tries a few candidates at a time, so that each weight it reads serves them all.
// ---

// 1 / x within an ulp or so, for codes that are compared only. Volatile: else it moves into inner loops.
__device__ inline float reciprocal(float x) {
    float result;
    asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

enum class Miss { squared, paired, power };

// Adding it leaves an integer, with a ulp of 1.
constexpr float kIntegers = 0x1.8p23F;

// Candidates and their losses. A code comes out of one multiplication that saturates, one that adds
// kIntegers and a subtraction; products next to a tie may fall on its other side, where the loss is the same.
template <Miss kMiss, int kCount>
struct Candidates {
    float scale[kCount], share[kCount], offset[kCount], zero[kCount], loss[kCount];
    float max_code, unit;  // unit: a code's share of all

    __device__ explicit Candidates(const SolveGrid& grid)
        : max_code(max_code_of(grid)), unit(1.0F / max_code) {}
    __device__ void set(int c, const Parameters& tried) {
        scale[c] = tried.scale;
        share[c] = unit * reciprocal(tried.scale);
        offset[c] = tried.zero * unit;
        zero[c] = tried.zero;
        loss[c] = 0.0F;
    }
    __device__ void add(float weight, float importance) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
            const float place = __saturatef(fmaf(weight, share[c], offset[c]));
            const float steps = fmaf(place, max_code, kIntegers) - (kIntegers + zero[c]);
            const float miss = fmaf(-scale[c], steps, weight);
            if constexpr (kMiss == Miss::power) {
                loss[c] += __powf(fabsf(miss), 2.4F);
            } else {
                loss[c] = fmaf(miss * importance, miss, loss[c]);
            }
        }
    }
    template <class Consider>
    __device__ void each(Consider consider) const {
#pragma unroll
        for (int c = 0; c < kCount; ++c) consider(c, loss[c], {scale[c], zero[c]});
    }
    template <class Sum>
    __device__ void sum_up(Sum sum) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) loss[c] = sum(loss[c]);
    }
};

// Scales with both signs of a symmetric grid, with L = 2^(b−1) steps on its longer side. They differ only
// where a weight is nearest to ±L, so one loss is that of a grid with L steps on both sides; the sign that
// has no code there pays (y − L + 1)² − (y − L)² = 2 (y − L + ½) steps² more, y > L − ½ the weight in steps.
// What weights above and below 0 pay is added up as the sum of both and their difference.
template <int kCount>
struct Candidates<Miss::paired, kCount> {
    static constexpr float kRange = 0x1p20F;  // of steps, inside which sums of those payments are exact
    float scale[kCount], share[kCount], range_share[kCount], loss[kCount], both[kCount], difference[kCount];
    float side, unit;  // L, and a step's share of both sides

    __device__ explicit Candidates(const SolveGrid& grid)
        : side(static_cast<float>(1 << (grid.bits - 1))), unit(0.5F / side) {}
    __device__ void set(int c, const Parameters& tried) {
        const float inverse = reciprocal(tried.scale);
        scale[c] = tried.scale;
        share[c] = inverse * unit;
        range_share[c] = inverse * (1.0F / kRange);
        loss[c] = both[c] = difference[c] = 0.0F;
    }
    __device__ void add(float weight, float importance) {
        const float edge = (side - 0.5F) / kRange;
        const float size = fabsf(weight);
        const float signed_importance = copysignf(importance, weight);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
            const float place = __saturatef(fmaf(weight, share[c], 0.5F));
            const float steps = fmaf(place, 2.0F * side, kIntegers) - (kIntegers + side);
            const float miss = fmaf(-scale[c], steps, weight);
            loss[c] = fmaf(miss * importance, miss, loss[c]);
            const float beyond = __saturatef(fmaf(size, range_share[c], -edge));
            both[c] = fmaf(beyond, importance, both[c]);
            difference[c] = fmaf(beyond, signed_importance, difference[c]);
        }
    }
    template <class Consider>
    __device__ void each(Consider consider) const {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
            const float payment = kRange * scale[c] * scale[c];
            consider(c, fmaf(payment, both[c] + difference[c], loss[c]), {scale[c], side});
            consider(c, fmaf(payment, both[c] - difference[c], loss[c]), {-scale[c], side});
        }
    }
    template <class Sum>
    __device__ void sum_up(Sum sum) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
            loss[c] = sum(loss[c]);
            both[c] = sum(both[c]);
            difference[c] = sum(difference[c]);
        }
    }
};

struct Best {
    float loss;
    Parameters parameters;
    int numerator;  // of its share of the min-max scale
};

// Tries the team's part of `count` shares of the min-max scale, kTried candidates at a time; the first of
// equals wins. numerator_of(i): of share i.
template <Miss kMiss, int kTried, class Elements, class Team, class Numerator>
__device__ void try_shares(Best& best, const Shrinks& shrinks, int count, Numerator numerator_of,
                           const Elements& elements, const Team& team, float low, float high,
                           const SolveGrid& grid) {
    const bool twins = kMiss != Miss::paired && (grid.sym ? grid.signed_scales : grid.bits == 2);
    const int variants = twins ? 2 : 1;
    const int run = (count * variants + Team::kParts - 1) / Team::kParts;
    const int end = min((team.part() + 1) * run, count * variants);
#pragma unroll 1
    for (int first = team.part() * run; first < end; first += kTried) {
        // Of candidate c, the last of the run again where there is none: it is no less than itself.
        const auto index_of = [&](int c) { return min(first + c, end - 1); };
        Candidates<kMiss, kTried> tried(grid);
#pragma unroll
        for (int c = 0; c < kTried; ++c) {
            const float shrink = shrinks.share(numerator_of(index_of(c) / variants));
            Parameters own = shrunk_parameters(low, high, shrink, grid);
            if (index_of(c) % variants == 1) own = twin_of(own, low, shrink, grid);
            tried.set(c, own);
        }
        elements.each([&](float weight, float importance) { tried.add(weight, importance); });
        tried.sum_up([&](float loss) { return team.sum(loss); });
        tried.each([&](int c, float loss, Parameters own) {
            if (loss < best.loss) best = {loss, own, numerator_of(index_of(c) / variants)};
        });
    }
    best = team.agree(best);
}

// The grid with the least loss of elements, the first of equals. elements.each(f) calls f(weight,
// importance) for the thread's own. Threads that search one grid are a team of Team::kParts parts, each with
// a run of the candidates; team.sum(x) adds over the threads of a part, which share its elements, and
// team.agree(best) returns the best of all parts.
template <Miss kMiss, class Elements, class Team>
__device__ Grid least_grid(const Elements& elements, const Team& team, float low, float high,
                           const SolveGrid& grid) {
    constexpr Shrinks kShrinks = shrinks_of(kMiss == Miss::power ? ScaleSearch::mse : ScaleSearch::hessian);
    // In one round, or by tens where they are many.
    constexpr auto tried_of = [](int shares) {
        return std::min((shares + Team::kParts - 1) / Team::kParts, 10);
    };
    const Shrinks shrinks = kShrinks;
    Best best{__int_as_float(0x7F800000), {1.0F, 0.0F}, 0};
    try_shares<kMiss, tried_of(kShrinks.count)>(
        best, shrinks, shrinks.count, [&](int i) { return shrinks.coarse(i); }, elements, team, low, high,
        grid);
    if constexpr (kShrinks.around > 0) {
        const int coarse = best.numerator;
        try_shares<kMiss, tried_of(2 * kShrinks.around)>(
            best, shrinks, 2 * shrinks.around, [&](int i) { return shrinks.fine(coarse, i); }, elements, team,
            low, high, grid);
    }
    return make_grid(best.parameters.scale, best.parameters.zero);
}

template <class Elements, class Team>
__device__ Grid search_grid(const Elements& elements, const Team& team, float low, float high,
                            const SolveGrid& grid) {
    if (grid.search == ScaleSearch::mse) return least_grid<Miss::power>(elements, team, low, high, grid);
    if (grid.signed_scales) return least_grid<Miss::paired>(elements, team, low, high, grid);
    return least_grid<Miss::squared>(elements, team, low, high, grid);
}

}  // namespace quantmill::cuda
