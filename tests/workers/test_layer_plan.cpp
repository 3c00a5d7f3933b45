#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <set>

#include "kernels/error.h"
#include "workers/layer_plan.h"

namespace quantmill {
namespace {

using Groups = std::vector<std::vector<int>>;

TEST(FormGroups, KeepRanksOfAHostTogether) {
    EXPECT_EQ(form_groups({"a", "a", "a", "a"}, 2), (Groups{{0, 1}, {2, 3}}));
    EXPECT_EQ(form_groups({"a", "b", "a", "b"}, 2),
              (Groups{{0, 2}, {1, 3}}));  // dealt in turn by the launcher
    EXPECT_EQ(form_groups({"b", "a", "a"}, 3), (Groups{{0}, {1}, {2}}));
    EXPECT_EQ(form_groups({"a", "a", "a", "a", "a"}, 2), (Groups{{0, 1}, {2, 3, 4}}));
    const LayerPlan plan{form_groups({"a", "b", "a", "b"}, 2), {}};
    EXPECT_EQ(plan.group_of(2), 0);
    EXPECT_EQ(plan.index_of(2), 1);
    EXPECT_EQ(plan.group_of(1), 1);
    EXPECT_THROW(static_cast<void>(plan.group_of(4)), InternalError);
}

double slowest(const std::vector<BlockRange>& ranges, const std::vector<double>& costs,
               const std::vector<double>& speeds) {
    double most = 0.0;
    for (std::size_t i = 0; i < ranges.size(); ++i) {
        const double cost =
            std::accumulate(costs.begin() + ranges[i].begin, costs.begin() + ranges[i].end, 0.0);
        most = std::max(most, cost / speeds[i]);
    }
    return most;
}

// Every way to cut, for comparison.
double best_by_force(const std::vector<double>& costs, const std::vector<double>& speeds, int longest) {
    const auto blocks = static_cast<int>(costs.size());
    const int shortest = costs.size() >= speeds.size() ? 1 : 0;
    double best = 1e300;
    std::vector<BlockRange> ranges;
    const std::function<void(int)> cut = [&](int begin) {
        if (ranges.size() == speeds.size()) {
            if (begin == blocks) best = std::min(best, slowest(ranges, costs, speeds));
            return;
        }
        for (int end = begin + shortest; end <= std::min(blocks, begin + longest); ++end) {
            ranges.push_back({begin, end});
            cut(end);
            ranges.pop_back();
        }
    };
    cut(0);
    return best;
}

TEST(CutBlocks, IsAsEvenAsCanBe) {
    const unsigned seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937 random(seed);
    for (int round = 0; round < 200; ++round) {
        std::vector<double> costs(1 + random() % 9), speeds(1 + random() % 4);
        for (double& cost : costs) cost = 1.0 + random() % 5;
        for (double& speed : speeds) speed = 1.0 + random() % 3;
        const auto blocks = static_cast<int>(costs.size());
        const auto parts = static_cast<int>(speeds.size());
        const int longest = (blocks + parts - 1) / parts + static_cast<int>(random() % 4);
        const auto ranges = cut_blocks(costs, speeds, longest);
        ASSERT_EQ(ranges.size(), speeds.size());
        int next = 0;
        for (const BlockRange& range : ranges) {
            EXPECT_EQ(range.begin, next);
            EXPECT_LE(range.count(), longest);
            if (blocks >= parts) {
                EXPECT_FALSE(range.empty());
            }
            next = range.end;
        }
        EXPECT_EQ(next, blocks);
        EXPECT_DOUBLE_EQ(slowest(ranges, costs, speeds), best_by_force(costs, speeds, longest));
    }
    EXPECT_THROW(cut_blocks({1, 1, 1}, {1}, 2), InternalError);
}

TEST(PlanWithoutStream, DealsBlocksInTurn) {
    const LayerPlan plan = plan_without_stream({"a", "a"}, 5);
    EXPECT_EQ(plan.groups, (Groups{{0}, {1}}));
    ASSERT_EQ(plan.sweeps.size(), 3U);
    EXPECT_EQ(plan.sweeps[1], (std::vector<BlockRange>{{2, 3}, {3, 4}}));
    EXPECT_EQ(plan.sweeps[2], (std::vector<BlockRange>{{4, 5}, {5, 5}}));
    EXPECT_EQ(plan_without_stream(std::vector<std::string>(7, "a"), 3).groups,
              (Groups{{0, 1}, {2, 3}, {4, 5, 6}}));
}

std::vector<SolveTask> tasks_of(const std::vector<double>& factors, double solve) {
    std::vector<SolveTask> tasks;
    for (const double factor : factors) tasks.push_back({0, tasks.size(), factor, solve});
    return tasks;
}

TEST(PlanSolves, EachTaskOnceAndTheLongestFirst) {
    const SolvePlan plan = plan_solves(tasks_of({1, 9, 3, 5, 4}, 0.0), 2);
    EXPECT_EQ(plan.team_of, (std::vector<int>{0, 1}));
    EXPECT_EQ(plan.leader, (std::vector<int>{0, 1}));
    // 9 | 5; then 4 to the second, 3 to the tie's first or second, 1 …: both end at 11 and 11 or better.
    EXPECT_DOUBLE_EQ(plan.seconds, 12.0);
    std::set<std::size_t> all;
    for (const auto& tasks : plan.tasks) {
        all.insert(tasks.begin(), tasks.end());
        EXPECT_TRUE(std::is_sorted(tasks.begin(), tasks.end(), [](std::size_t a, std::size_t b) {
            const std::vector<double> cost{1, 9, 3, 5, 4};
            return cost[a] > cost[b];
        }));
    }
    EXPECT_EQ(all.size(), 5U);
}

TEST(PlanSolves, MoreRanksThanTasksSplitRowsWhereItHelps) {
    std::vector<SolveTask> tasks = tasks_of({1, 1}, 0.0);
    tasks[1].solve = 30.0;
    const SolvePlan plan = plan_solves(tasks, 4);
    EXPECT_EQ(plan.team_of, (std::vector<int>{0, 1, 1, 1}));
    EXPECT_EQ(plan.leader, (std::vector<int>{0, 1}));
    EXPECT_DOUBLE_EQ(plan.seconds, 11.0);
    const SolvePlan nothing = plan_solves({}, 3);
    EXPECT_EQ(nothing.team_of, (std::vector<int>{0, 0, 0}));
    EXPECT_TRUE(nothing.tasks.at(0).empty());
}

TEST(Bubble, IsFillAndDrainOverAll) {
    EXPECT_EQ(bubble_fraction(1, 8), 0.0);
    EXPECT_DOUBLE_EQ(bubble_fraction(2, 31), 1.0 / 32);
    EXPECT_DOUBLE_EQ(bubble_fraction(8, 1), 7.0 / 8);
}

}  // namespace
}  // namespace quantmill
