#include "workers/layer_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/error.h"
#include "workers/placement.h"

namespace quantmill {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// Ranks host by host, in the order in which hosts first appear.
std::vector<int> by_host(const std::vector<std::string>& hosts) {
    std::vector<int> ranks(hosts.size());
    std::iota(ranks.begin(), ranks.end(), 0);
    const auto first_of = [&](int rank) {
        return std::find(hosts.begin(), hosts.end(), hosts[static_cast<std::size_t>(rank)]) - hosts.begin();
    };
    std::stable_sort(ranks.begin(), ranks.end(), [&](int a, int b) { return first_of(a) < first_of(b); });
    return ranks;
}

// Gives each task a team and every further rank to the team that would be last.
std::vector<int> size_teams(const std::vector<SolveTask>& tasks, int ranks) {
    std::vector<int> sizes(tasks.size(), 1);
    const auto seconds = [&](std::size_t t) { return tasks[t].factor + tasks[t].solve / sizes[t]; };
    for (auto left = ranks - static_cast<int>(tasks.size()); left > 0; --left) {
        std::size_t last = 0;
        for (std::size_t t = 1; t < tasks.size(); ++t) last = seconds(t) > seconds(last) ? t : last;
        ++sizes[last];
    }
    return sizes;
}

}  // namespace

int LayerPlan::group_of(int rank) const {
    for (std::size_t group = 0; group < groups.size(); ++group) {
        if (std::find(groups[group].begin(), groups[group].end(), rank) != groups[group].end()) {
            return static_cast<int>(group);
        }
    }
    throw InternalError("rank {} is in no group", rank);
}

int LayerPlan::index_of(int rank) const {
    const std::vector<int>& group = groups[static_cast<std::size_t>(group_of(rank))];
    return static_cast<int>(std::find(group.begin(), group.end(), rank) - group.begin());
}

std::vector<std::vector<int>> form_groups(const std::vector<std::string>& hosts, int count) {
    const std::vector<int> ranks = by_host(hosts);
    const auto size = static_cast<std::int64_t>(ranks.size());
    std::vector<std::vector<int>> groups;
    for (std::int64_t g = 0; g < count; ++g) {
        std::vector<int> group(ranks.begin() + size * g / count, ranks.begin() + size * (g + 1) / count);
        std::sort(group.begin(), group.end());
        groups.push_back(std::move(group));
    }
    return groups;
}

std::vector<BlockRange> cut_blocks(const std::vector<double>& costs, const std::vector<double>& speeds,
                                   int longest) {
    const auto blocks = static_cast<int>(costs.size());
    const auto parts = static_cast<int>(speeds.size());
    std::vector<double> before(costs.size() + 1, 0.0);
    std::partial_sum(costs.begin(), costs.end(), before.begin() + 1);
    const int shortest = blocks >= parts ? 1 : 0;

    // best[p][b]: the least time of the slowest when the first p ranges hold the first b blocks.
    const auto width = static_cast<std::size_t>(blocks) + 1;
    std::vector<std::vector<double>> best(speeds.size() + 1, std::vector<double>(width, kNever));
    std::vector<std::vector<int>> cut(speeds.size() + 1, std::vector<int>(width, 0));
    best[0][0] = 0.0;
    for (std::size_t p = 1; p <= speeds.size(); ++p) {
        for (int b = 0; b <= blocks; ++b) {
            for (int a = std::max(0, b - longest); a <= b - shortest; ++a) {
                const auto at = static_cast<std::size_t>(a), bt = static_cast<std::size_t>(b);
                const double time = std::max(best[p - 1][at], (before[bt] - before[at]) / speeds[p - 1]);
                if (time < best[p][bt]) {
                    best[p][bt] = time;
                    cut[p][bt] = a;
                }
            }
        }
    }
    if (best.back().back() == kNever) {
        throw InternalError("{} blocks do not fit {} ranges of at most {}", blocks, parts, longest);
    }
    std::vector<BlockRange> ranges(speeds.size());
    int end = blocks;
    for (std::size_t p = speeds.size(); p > 0; --p) {
        ranges[p - 1] = {cut[p][static_cast<std::size_t>(end)], end};
        end = ranges[p - 1].begin;
    }
    return ranges;
}

LayerPlan plan_without_stream(const std::vector<std::string>& hosts, int blocks) {
    const int groups = std::min(static_cast<int>(hosts.size()), blocks);
    LayerPlan plan{form_groups(hosts, groups), {}, false};
    for (int begin = 0; begin < blocks; begin += groups) {
        std::vector<BlockRange>& sweep = plan.sweeps.emplace_back();
        for (int group = 0; group < groups; ++group) {
            sweep.push_back({std::min(begin + group, blocks), std::min(begin + group + 1, blocks)});
        }
    }
    return plan;
}

SolvePlan plan_solves(const std::vector<SolveTask>& tasks, int ranks) {
    SolvePlan plan;
    const auto count = static_cast<int>(tasks.size());
    std::vector<double> costs;
    for (const SolveTask& task : tasks) costs.push_back(task.factor + task.solve);
    const int teams = std::max(1, std::min(count, ranks));
    plan.tasks.resize(static_cast<std::size_t>(teams));
    std::vector<int> sizes(static_cast<std::size_t>(teams), 1);
    if (count == 0) {
        sizes[0] = ranks;
    } else if (count <= ranks) {
        sizes = size_teams(tasks, ranks);
        for (std::size_t t = 0; t < tasks.size(); ++t) plan.tasks[t].push_back(t);
    } else {
        const std::vector<int> owners = longest_first(costs, ranks);
        for (std::size_t t = 0; t < tasks.size(); ++t) {
            plan.tasks[static_cast<std::size_t>(owners[t])].push_back(t);
        }
    }
    for (int team = 0; team < teams; ++team) {
        auto& own = plan.tasks[static_cast<std::size_t>(team)];
        std::stable_sort(own.begin(), own.end(),
                         [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
        plan.leader.push_back(static_cast<int>(plan.team_of.size()));
        const int size = sizes[static_cast<std::size_t>(team)];
        plan.team_of.insert(plan.team_of.end(), static_cast<std::size_t>(size), team);
        double seconds = 0.0;
        for (const std::size_t t : own) seconds += tasks[t].factor + tasks[t].solve / size;
        plan.seconds = std::max(plan.seconds, seconds);
    }
    return plan;
}

double bubble_fraction(int groups, double items) {
    const double idle = groups - 1;
    return idle == 0.0 ? 0.0 : idle / (items + idle);
}

}  // namespace quantmill
