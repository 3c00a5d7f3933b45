#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>

#include "pipeline/bit_budget.h"
#include "tests/pipeline/expect_error.h"

namespace quantmill {
namespace {

using Groups = std::vector<std::vector<BitOption>>;

// The least loss within the budget, of all choices.
double least_loss(const Groups& groups, std::uint64_t budget) {
    double least = std::numeric_limits<double>::infinity();
    std::vector<std::size_t> choice(groups.size(), 0);
    for (;;) {
        if (stored_bits_of(groups, choice) <= budget) least = std::min(least, loss_of(groups, choice));
        std::size_t g = 0;
        while (g < groups.size() && ++choice[g] == groups[g].size()) choice[g++] = 0;
        if (g == groups.size()) return least;
    }
}

TEST(BitBudget, IsNeverFarFromTheBestChoice) {
    for (unsigned seed = 0; seed < 200; ++seed) {
        std::mt19937 random(seed);
        std::uniform_real_distribution<double> uniform(0.1, 1.0);
        Groups groups;
        double largest_step = 0.0;
        for (int g = 0; g < 6; ++g) {
            const std::uint64_t weights = 100 + random() % 400;
            double loss = 100.0 * uniform(random);
            std::vector<BitOption>& options = groups.emplace_back();
            for (const int bits : {2, 3, 4, 8}) {
                options.push_back({bits, weights * static_cast<std::uint64_t>(bits), loss});
                largest_step = std::max(largest_step, options.front().loss - loss);
                loss *= 0.5 * uniform(random);
            }
        }
        const std::uint64_t least = stored_bits_of(groups, std::vector<std::size_t>(6, 0));
        const std::uint64_t budget = least + random() % (3 * least);
        const auto choice = choose_options(groups, budget);
        EXPECT_LE(stored_bits_of(groups, choice), budget) << "seed " << seed;
        const double best = least_loss(groups, budget);
        EXPECT_GE(loss_of(groups, choice), best - 1e-9) << "seed " << seed;
        EXPECT_LE(loss_of(groups, choice), best + largest_step) << "seed " << seed;
    }
}

TEST(BitBudget, ChoosesByHand) {
    // A steep group, a flat one, and one that gains nothing.
    const Groups groups{{{2, 200, 100.0}, {3, 300, 10.0}, {4, 400, 1.0}},
                        {{2, 200, 5.0}, {3, 300, 4.0}, {4, 400, 0.0}},
                        {{2, 200, 1.0}, {3, 300, 1.0}}};
    EXPECT_EQ(choose_options(groups, 600), (std::vector<std::size_t>{0, 0, 0}));
    EXPECT_EQ(choose_options(groups, 700), (std::vector<std::size_t>{1, 0, 0}));
    EXPECT_EQ(choose_options(groups, 899), (std::vector<std::size_t>{2, 0, 0}));
    EXPECT_EQ(choose_options(groups, 900), (std::vector<std::size_t>{2, 1, 0})) << "the slack is used";
    EXPECT_EQ(choose_options(groups, 5000), (std::vector<std::size_t>{2, 2, 0}));
    testing::expect_error<BadInput>([&] { choose_options(groups, 599); }, {"600 bits", "599"});
}

}  // namespace
}  // namespace quantmill
