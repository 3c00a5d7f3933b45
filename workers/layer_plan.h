#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace quantmill {

// Who streams, holds and solves what when Hessians come from the unquantized model, so that groups of ranks
// own ranges of blocks. As in placement.h, nothing computed depends on it.

struct BlockRange {
    int begin = 0, end = 0;
    int count() const { return end - begin; }
    bool empty() const { return begin == end; }
    friend bool operator==(const BlockRange&, const BlockRange&) = default;
};

struct LayerPlan {
    std::vector<std::vector<int>> groups;  // ranks of each; the first has the job's first shard
    // [sweep][group]: the blocks that a group holds while the hidden states pass; consecutive over groups,
    // then over sweeps. In each sweep the hidden states go through all groups once, then back to the first.
    std::vector<std::vector<BlockRange>> sweeps;
    bool streams = true;  // false: Hessians come from a store, and nothing passes between groups

    int group_of(int rank) const;
    // Place of a rank in its group.
    int index_of(int rank) const;
};

// Ranks in `count` groups: those of a host stay together where they can, sizes differ by one at most.
std::vector<std::vector<int>> form_groups(const std::vector<std::string>& hosts, int count);

// Cuts blocks of these costs into consecutive ranges, one for each speed, so that the slowest range takes as
// little time as possible; none is empty while there are enough blocks, and none longer than `longest`.
std::vector<BlockRange> cut_blocks(const std::vector<double>& costs, const std::vector<double>& speeds,
                                   int longest);

// Blocks dealt to groups one at a time, for Hessians that need no stream.
LayerPlan plan_without_stream(const std::vector<std::string>& hosts, int blocks);

// The rank of a group, by place, that owns a batch shard: dealt in turn, so that groups of other sizes can
// begin before a rank is through with its shards.
inline int shard_owner(std::size_t shard, std::size_t group_size) {
    return static_cast<int>(shard % group_size);
}

// A Hessian to factor, and rows to solve with it.
struct SolveTask {
    int block = 0;
    std::size_t stage = 0;
    double factor = 0.0, solve = 0.0;  // seconds of one rank
};

// Which ranks of a group solve which tasks. With as many tasks as ranks or more each rank is a team of its
// own; with fewer, teams split rows.
struct SolvePlan {
    std::vector<int> team_of;                     // [place in the group]
    std::vector<int> leader;                      // [team]: place in the group; it factors
    std::vector<std::vector<std::size_t>> tasks;  // [team]: the longest first
    double seconds = 0.0;                         // of the busiest team
};
SolvePlan plan_solves(const std::vector<SolveTask>& tasks, int ranks);

// The share of time that groups idle while the stream of `items` micro-batches a rank fills and drains them.
double bubble_fraction(int groups, double items);

}  // namespace quantmill
