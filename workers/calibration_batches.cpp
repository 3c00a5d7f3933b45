#include "workers/calibration_batches.h"

#include <algorithm>

namespace quantmill {
namespace {

std::int64_t tokens_in(std::span<const BatchShard> shards) {
    std::int64_t tokens = 0;
    for (const BatchShard& shard : shards) tokens += shard.tokens();
    return tokens;
}

}  // namespace

CalibrationBatches::CalibrationBatches(Backend& backend, const ModelGraph& graph,
                                       std::span<const BatchShard> shards)
    : backend_(backend),
      hidden_(backend, {tokens_in(shards), graph.hidden_size}, backend.activation_dtype(), "hidden states"),
      carried_(backend, {tokens_in(shards), BlockForward::carried_width(graph)}, backend.activation_dtype(),
               "inputs carried between stages") {
    std::int64_t token = 0;
    for (const BatchShard& shard : shards) {
        std::vector<Batch>& batches = shards_.emplace_back();
        for (const MicroBatch& batch : shard.micro_batches) {
            batches.push_back({batch, token});
            token += batch.sequences.tokens();
        }
    }
}

BatchState CalibrationBatches::state(const Batch& batch) {
    const std::int64_t end = batch.first_token + batch.plan.sequences.tokens();
    return {&batch.plan.sequences, hidden_.view().rows(batch.first_token, end),
            carried_.view().rows(batch.first_token, end)};
}

void CalibrationBatches::embed(const std::vector<std::vector<std::int32_t>>& sequences,
                               ConstTensorView table) {
    for_each([&](const Batch& batch) {
        backend_.embed(tokens_of(batch.plan, sequences), table, state(batch).hidden);
    });
}

std::size_t CalibrationBatches::bytes(const ModelGraph& graph, std::int64_t tokens, DType activation) {
    const std::int64_t width = graph.hidden_size + BlockForward::carried_width(graph);
    return static_cast<std::size_t>(tokens * width) * size_of(activation);
}

BatchLimits limits_of(std::span<const BatchShard> shards) {
    BatchLimits limits;
    for (const BatchShard& shard : shards) {
        for (const MicroBatch& batch : shard.micro_batches) {
            limits.tokens = std::max(limits.tokens, batch.sequences.tokens());
            const auto& offsets = batch.sequences.offsets;
            for (std::size_t i = 1; i < offsets.size(); ++i) {
                limits.length = std::max<std::int64_t>(limits.length, offsets[i] - offsets[i - 1]);
            }
        }
    }
    return limits;
}

std::vector<std::int32_t> tokens_of(const MicroBatch& batch,
                                    const std::vector<std::vector<std::int32_t>>& sequences) {
    std::vector<std::int32_t> tokens;
    for (std::int64_t i = 0; i < batch.sequences.count(); ++i) {
        const auto& sequence = sequences[static_cast<std::size_t>(batch.first_sequence + i)];
        tokens.insert(tokens.end(), sequence.begin(), sequence.end());
    }
    return tokens;
}

}  // namespace quantmill
