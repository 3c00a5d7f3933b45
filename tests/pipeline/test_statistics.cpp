#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "pipeline/statistics.h"

namespace quantmill {
namespace {

TEST(Statistics, QuantilesInterpolate) {
    EXPECT_EQ(quantile({7.0}, 0.975), 7.0);
    EXPECT_EQ(quantile({4.0, 1.0, 3.0, 2.0}, 0.0), 1.0);
    EXPECT_EQ(quantile({4.0, 1.0, 3.0, 2.0}, 1.0), 4.0);
    EXPECT_DOUBLE_EQ(quantile({4.0, 1.0, 3.0, 2.0}, 0.5), 2.5);
    EXPECT_DOUBLE_EQ(quantile({10.0, 0.0}, 0.025), 0.25);
}

TEST(Statistics, TokenMeanWeighsSequencesByTheirTokens) {
    const std::vector<double> sums{6.0, 10.0, 1.0};
    const std::vector<double> tokens{3.0, 2.0, 1.0};
    EXPECT_DOUBLE_EQ(token_mean(std::vector<double>{1, 1, 1}, sums, tokens), 17.0 / 6.0);
    EXPECT_DOUBLE_EQ(token_mean(std::vector<double>{0, 2, 1}, sums, tokens), 21.0 / 5.0);
}

// Draws whole sequences one by one and averages their tokens, as the definition says.
TEST(Statistics, BootstrapIsThatOfTheDefinition) {
    std::mt19937_64 seed(5);
    std::normal_distribution<double> normal(3.0, 0.5);
    std::vector<double> sums;
    std::vector<double> tokens;
    for (int s = 0; s < 17; ++s) {
        tokens.push_back(static_cast<double>(1 + seed() % 50));
        sums.push_back(tokens.back() * normal(seed));
    }
    std::mt19937_64 random(kBootstrapSeed);
    std::vector<double> expected;
    for (int resample = 0; resample < kBootstrapResamples; ++resample) {
        long double sum = 0.0L;
        long double count = 0.0L;
        for (std::size_t draw = 0; draw < sums.size(); ++draw) {
            const auto s = static_cast<std::size_t>(random() % sums.size());
            sum += sums[s];
            count += tokens[s];
        }
        expected.push_back(static_cast<double>(std::exp(sum / count)));
    }
    const auto interval = bootstrap(sums.size(), [&](std::span<const double> weights) {
        return std::exp(token_mean(weights, sums, tokens));
    });
    ASSERT_TRUE(interval);
    EXPECT_NEAR(interval->low, quantile(expected, 0.025), 1e-12 * interval->low);
    EXPECT_NEAR(interval->high, quantile(expected, 0.975), 1e-12 * interval->high);
    EXPECT_LT(interval->low, interval->high);
}

// The mean of n normal values of deviation 1 has an interval of ± 1.96 / sqrt(n).
TEST(Statistics, BootstrapFindsTheSpreadOfAMean) {
    std::mt19937_64 random(11);
    std::normal_distribution<double> normal;
    std::vector<double> values;
    for (int s = 0; s < 400; ++s) values.push_back(normal(random));
    const std::vector<double> ones(400, 1.0);
    const auto interval =
        bootstrap(400, [&](std::span<const double> weights) { return token_mean(weights, values, ones); });
    EXPECT_NEAR(interval->high - interval->low, 2 * 1.96 / 20.0, 0.03);
}

TEST(Statistics, OneSequenceHasNoInterval) {
    EXPECT_FALSE(bootstrap(1, [](std::span<const double>) { return 1.0; }));
}

}  // namespace
}  // namespace quantmill
