#pragma once

#include <cstdint>
#include <vector>

#include "comm/communicator.h"

namespace quantmill {

// Who owns which piece of the job's fixed decomposition. Ranks are interchangeable: nothing computed depends
// on these choices (docs/design.md, "The same bytes").

// Batch shards [begin, end) of a rank; empty when there are more ranks than shards. Rank 0 always owns shard
// 0.
RowRange shards_of_rank(std::int64_t shards, int rank, int world_size);

// Rows of a linear group that each rank solves, cut at multiples of kSolveRowBlock.
std::vector<RowRange> solve_ranges(std::int64_t rows, int world_size);

// The rank that factors the Hessian of a stage of a block: dealt in turn.
int factor_rank(int block, std::size_t stage, std::size_t stages, int world_size);

// The ranks of tasks that run at the same time, of known costs: the longest first, each to the rank that has
// least to do.
std::vector<int> longest_first(const std::vector<double>& costs, int ranks);

// Indices of the output shards that a rank writes.
std::vector<std::size_t> output_shards_of_rank(std::size_t shards, int rank, int world_size);

}  // namespace quantmill
