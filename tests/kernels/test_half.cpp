#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "kernels/half.h"

namespace quantmill {
namespace {

// The value of a binary16 from its fields.
double decode(std::uint16_t bits) {
    const int exponent = (bits >> 10) & 31;
    const int fraction = bits & 1023;
    const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
    if (exponent == 31) return fraction == 0 ? sign * INFINITY : NAN;
    if (exponent == 0) return sign * std::ldexp(fraction, -24);
    return sign * std::ldexp(1024 + fraction, exponent - 25);
}

TEST(Half, DecodesEveryValue) {
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
        const auto narrow = static_cast<std::uint16_t>(bits);
        const double expected = decode(narrow);
        const float value = to_float(Half{narrow});
        if (std::isnan(expected)) {
            EXPECT_TRUE(std::isnan(value));
        } else {
            EXPECT_EQ(value, expected);
            EXPECT_EQ(std::signbit(value), std::signbit(expected));
            EXPECT_EQ(to_half(value).bits, narrow);
        }
    }
    EXPECT_TRUE(std::isnan(to_float(to_half(NAN))));
}

// Between neighbours the nearer one, in the middle the even one.
TEST(Half, RoundsToNearestEven) {
    for (std::uint16_t bits = 0; bits < 0x7BFF; ++bits) {
        const auto low = static_cast<float>(decode(bits));
        const auto high = static_cast<float>(decode(static_cast<std::uint16_t>(bits + 1)));
        const float middle = low + (high - low) / 2;
        const auto even = static_cast<std::uint16_t>(bits + (bits & 1));
        EXPECT_EQ(to_half(middle).bits, even);
        EXPECT_EQ(to_half(std::nextafter(middle, low)).bits, bits);
        EXPECT_EQ(to_half(std::nextafter(middle, high)).bits, bits + 1);
        EXPECT_EQ(to_half(-middle).bits, even | 0x8000);
    }
    EXPECT_EQ(to_half(65519.99F).bits, 0x7BFF);
    EXPECT_EQ(to_half(65520.0F).bits, 0x7C00);
    EXPECT_EQ(to_half(std::numeric_limits<float>::infinity()).bits, 0x7C00);
    EXPECT_EQ(to_half(1e-30F).bits, 0);
}

TEST(BFloat16, RoundsToNearestEven) {
    std::mt19937 random(7);
    for (int i = 0; i < 100000; ++i) {
        const std::uint32_t upper = random() & 0x7F7EU;  // finite, and so is its neighbour
        const auto low = std::bit_cast<float>(upper << 16U);
        const auto high = std::bit_cast<float>((upper + 1) << 16U);
        const auto middle = std::bit_cast<float>((upper << 16U) | 0x8000U);
        EXPECT_EQ(to_float(BFloat16{static_cast<std::uint16_t>(upper)}), low);
        EXPECT_EQ(to_bfloat16(middle).bits, upper + (upper & 1U));
        EXPECT_EQ(to_bfloat16(std::nextafter(middle, low)).bits, upper);
        EXPECT_EQ(to_bfloat16(std::nextafter(middle, high)).bits, upper + 1);
    }
    EXPECT_TRUE(std::isnan(to_float(to_bfloat16(NAN))));
    EXPECT_TRUE(std::isnan(to_float(to_bfloat16(std::bit_cast<float>(0x7F800001U)))));
    EXPECT_EQ(to_float(to_bfloat16(-INFINITY)), -INFINITY);
    EXPECT_EQ(to_float(to_bfloat16(std::numeric_limits<float>::max())), INFINITY);
}

}  // namespace
}  // namespace quantmill
