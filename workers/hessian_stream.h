#pragma once

#include <vector>

#include "pipeline/block_weights.h"
#include "pipeline/forward.h"
#include "workers/coordinator.h"
#include "workers/group_solver.h"
#include "workers/hidden_stream.h"

namespace quantmill {

// Of the work of a sweep, about: what the progress view takes the stream for; the rest is solving.
inline constexpr double kStreamShare = 0.8;

// A block in the memory of the ranks of a group.
struct HeldBlock {
    int block = 0;
    BlockWeights weights;
    std::vector<ReducedHessian> hessians;  // [stage]
    std::vector<StageSeconds> seconds;     // [stage], of this rank
    Tensor probe_input, probe_output;      // [T, hidden_size] of a BlockProbe, where there is one
};

// Streams the job's hidden states through the blocks of this rank's group and accumulates their Hessians on
// the way.
class HessianStream {
public:
    // `shards`: of the job; `sequences`: their tokens. The first probe_tokens hidden states that enter a
    // block become its probe_input, on all ranks of the group.
    HessianStream(Backend& backend, const ModelGraph& graph, const LayerPlan& plan, LayerLinks& links,
                  int rank, Coordinator& coordinator, std::span<const BatchShard> shards,
                  const std::vector<std::vector<std::int32_t>>& sequences, std::int64_t probe_tokens = 0);

    // The first group needs the embedding's table for the first sweep.
    bool needs_embedding(std::size_t sweep) const { return group_ == 0 && sweep == 0; }
    // Passes all micro-batches of this rank through the held blocks, which have their weights; afterwards
    // each has this rank's part of its Hessians, with exponents and levels alike on all ranks of the group.
    // Collective over the ranks of a group; groups wait for each other's hidden states.
    void run(std::size_t sweep, ConstTensorView embedding, std::vector<HeldBlock>& held);

    // Seconds that this rank waited for hidden states.
    double seconds_waited() const { return seconds_waited_; }

private:
    void prepare(std::vector<HeldBlock>& held) const;
    void compute(const StreamItem& item, TensorView hidden, std::vector<HeldBlock>& held);
    void run_block(HeldBlock& held, const MicroBatch& batch, const BatchState& state);
    void close_shard(const BatchShard& shard, std::vector<HeldBlock>& held);
    void share_probes(std::vector<HeldBlock>& held);
    void agree_on_exponents(std::vector<HeldBlock>& held);
    void report(std::size_t sweep, std::size_t item);

    Backend& backend_;
    const ModelGraph& graph_;
    LayerLinks& links_;
    Coordinator& coordinator_;
    std::span<const BatchShard> shards_;
    const std::vector<std::vector<std::int32_t>>& sequences_;
    int group_;
    std::size_t sweeps_;
    int last_block_;  // lm_head, or the last block before it
    std::int64_t job_shards_;
    std::int64_t probe_tokens_;
    HiddenStream hidden_;
    BlockForward forward_;
    Tensor carried_;  // [largest micro-batch, carried_width]
    bool agreed_ = false;
    double seconds_waited_ = 0.0;
};

// Visits every Hessian of the held blocks, in the same order on all ranks of the group.
template <class Visit>
void for_each_hessian(std::vector<HeldBlock>& held, const Visit& visit) {
    for (HeldBlock& block : held) {
        for (std::size_t stage = 0; stage < block.hessians.size(); ++stage) visit(block, stage);
    }
}

}  // namespace quantmill
