#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"

namespace quantmill {

// Sequences [first, first + sequences.count()) of the job, computed in one call of each operation.
struct MicroBatch {
    std::int64_t first_sequence = 0;
    Sequences sequences;
};

// A fixed share of the calibration sequences whose Hessian is always accumulated in the same order. Shards
// belong to the job, not to ranks, so the result does not depend on how many ranks there are.
struct BatchShard {
    std::vector<MicroBatch> micro_batches;
    std::int64_t tokens() const;
};

// Sequences of a shard are consecutive. The number of shards is a power of two, at most kMaxBatchShards and
// at most the number of sequences. A micro-batch takes whole sequences up to micro_batch_tokens (the
// backend's own), at least one.
inline constexpr std::int64_t kMaxBatchShards = 16;
std::vector<BatchShard> plan_batch_shards(std::span<const std::int64_t> lengths,
                                          std::int64_t micro_batch_tokens);

}  // namespace quantmill
