#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "pipeline/batch_plan.h"
#include "pipeline/forward.h"

namespace quantmill {

// The micro-batches that one rank owns and what it keeps of them between blocks: the residual stream and the
// input carried to the next stage, for all its tokens.
class CalibrationBatches {
public:
    struct Batch {
        MicroBatch plan;
        std::int64_t first_token = 0;  // in this rank's buffers
    };

    // `shards`: those of this rank.
    CalibrationBatches(Backend& backend, const ModelGraph& graph, std::span<const BatchShard> shards);

    std::size_t shards() const { return shards_.size(); }
    const std::vector<Batch>& shard(std::size_t index) const { return shards_[index]; }
    // Calls visit(batch) for all batches in order.
    template <class Visit>
    void for_each(const Visit& visit) const {
        for (const auto& batches : shards_) {
            for (const Batch& batch : batches) visit(batch);
        }
    }
    BatchState state(const Batch& batch);
    // hidden = embedding of the batches' tokens; table [V, C] as stored.
    void embed(const std::vector<std::vector<std::int32_t>>& sequences, ConstTensorView table);

    static std::size_t bytes(const ModelGraph& graph, std::int64_t tokens, DType activation);

private:
    Backend& backend_;
    std::vector<std::vector<Batch>> shards_;
    Tensor hidden_;   // [tokens, hidden_size]
    Tensor carried_;  // [tokens, carried_width]
};

// The largest micro-batch and the longest sequence of a job: what scratch buffers are sized for.
struct BatchLimits {
    std::int64_t tokens = 0;
    std::int64_t length = 0;
};
BatchLimits limits_of(std::span<const BatchShard> shards);

// The tokens of a micro-batch, one sequence after the other.
std::vector<std::int32_t> tokens_of(const MicroBatch& batch,
                                    const std::vector<std::vector<std::int32_t>>& sequences);

}  // namespace quantmill
