#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

// Exponentials without branches, tables or calls, so that loops over them vectorise; the C library's
// do not unless -ffast-math changes everything else too.
namespace quantmill {

// e^x within 2 ulp for −87 <= x <= 88, nothing sensible beyond.
inline float vector_exp_inside(float x) {
    constexpr float kShift = 0x1.8p23F;  // adding it leaves an integer in the low bits
    const float shifted = x * 1.44269504F + kShift;
    const float n = shifted - kShift;
    const float r = (x - n * 0x1.62e4p-1F) - n * 0x1.7f7d1cp-20F;  // ln 2 in two parts
    float p = 1.0F / 5040;                                         // Taylor: |r| <= ln 2 / 2
    p = p * r + 1.0F / 720;
    p = p * r + 1.0F / 120;
    p = p * r + 1.0F / 24;
    p = p * r + 1.0F / 6;
    p = p * r + 0.5F;
    p = p * r + 1.0F;
    p = p * r + 1.0F;
    return p * std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) << 23U) + 0x3F800000U);
}

// The same; arguments beyond are taken as those bounds.
inline float vector_exp(float x) { return vector_exp_inside(std::min(std::max(x, -87.0F), 88.0F)); }

// The natural logarithm of x >= 0 within 3e-7, absolutely where |log x| < 1, else relatively; of 0 and what
// is subnormal about −88.
inline float vector_log(float x) {
    // m in [sqrt(1/2), sqrt(2)): the exponent is taken from the bits so shifted.
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x) - 0x3F3504F3U;
    const auto exponent = static_cast<float>(static_cast<std::int32_t>(bits) >> 23);
    const float m = std::bit_cast<float>((bits & 0x007FFFFFU) + 0x3F3504F3U);
    const float t = (m - 1.0F) / (m + 1.0F);  // log m = 2 artanh t, |t| < 0.172
    const float square = t * t;
    float p = 1.0F / 9;
    p = p * square + 1.0F / 7;
    p = p * square + 1.0F / 5;
    p = p * square + 1.0F / 3;
    p = p * square + 1.0F;
    return exponent * 0.693147182F + 2.0F * t * p;
}

// e^x within 4 ulp for −708 <= x <= 709; arguments beyond are taken as those bounds.
inline double vector_exp(double x) {
    constexpr double kShift = 0x1.8p52;
    x = std::min(std::max(x, -708.0), 709.0);
    const double shifted = x * 1.4426950408889634 + kShift;
    const double n = shifted - kShift;
    const double r = (x - n * 0x1.62e42fefap-1) - n * 0x1.cf79abc9e3b3ap-40;
    double p = 1.0 / 6227020800;
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const std::uint64_t power = (std::bit_cast<std::uint64_t>(shifted) << 52U) + 0x3FF0000000000000U;
    return p * std::bit_cast<double>(power);
}

}  // namespace quantmill
