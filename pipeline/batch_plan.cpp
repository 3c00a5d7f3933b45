#include "pipeline/batch_plan.h"

#include <algorithm>
#include <bit>

namespace quantmill {
namespace {

BatchShard plan_shard(std::span<const std::int64_t> lengths, std::int64_t begin, std::int64_t end,
                      std::int64_t micro_batch_tokens) {
    BatchShard shard;
    for (std::int64_t sequence = begin; sequence < end; ++sequence) {
        const std::int64_t length = lengths[static_cast<std::size_t>(sequence)];
        if (shard.micro_batches.empty() ||
            shard.micro_batches.back().sequences.tokens() + length > micro_batch_tokens) {
            shard.micro_batches.push_back({sequence, {}});
        }
        std::vector<std::int32_t>& offsets = shard.micro_batches.back().sequences.offsets;
        offsets.push_back(offsets.back() + static_cast<std::int32_t>(length));
    }
    return shard;
}

}  // namespace

std::int64_t BatchShard::tokens() const {
    std::int64_t sum = 0;
    for (const MicroBatch& batch : micro_batches) sum += batch.sequences.tokens();
    return sum;
}

std::vector<BatchShard> plan_batch_shards(std::span<const std::int64_t> lengths,
                                          std::int64_t micro_batch_tokens) {
    const auto sequences = static_cast<std::int64_t>(lengths.size());
    const auto wanted = static_cast<std::uint64_t>(std::min(sequences, kMaxBatchShards));
    const auto shards = static_cast<std::int64_t>(std::bit_floor(wanted));
    std::vector<BatchShard> plan;
    for (std::int64_t s = 0; s < shards; ++s) {
        plan.push_back(
            plan_shard(lengths, s * sequences / shards, (s + 1) * sequences / shards, micro_batch_tokens));
    }
    return plan;
}

}  // namespace quantmill
