#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "comm/communicator.h"
#include "jobs/report.h"
#include "pipeline/block_weights.h"
#include "pipeline/forward.h"
#include "pipeline/gptq_solver.h"
#include "pipeline/hessian.h"
#include "workers/calibration_batches.h"
#include "workers/coordinator.h"
#include "workers/group_solver.h"
#include "workers/stage_clock.h"

namespace quantmill {

// One rank's part in quantizing a block when Hessians come from the quantized blocks before it: its batch
// shards, its rows, its turn at factoring. All ranks call alike.
class Worker {
public:
    struct Options {
        const QuantizationScheme& scheme;
        bool true_sequential = true;
        ActivationPlacement activations;  // with error propagation: of each of both paths
    };
    // `all`: the ranks that share the sequences; `rows`: those among them that share the rows. `shards`: all
    // of the job.
    Worker(Backend& backend, Team all, Team rows, Coordinator& coordinator, const ModelGraph& graph,
           const Options& options, std::span<const BatchShard> shards);

    void embed(const std::vector<std::vector<std::int32_t>>& sequences, ConstTensorView table);

    // Quantizes the stages of a block in order, hands each group to `done` (null: it stays as it is), and
    // moves the hidden states past the block; block number graph.blocks is lm_head. Consumes the stored
    // weights.
    using StageDone = std::function<void(std::size_t stage, const QuantizedGroup* group)>;
    void quantize_block(int block, BlockWeights& weights, const StageDone& done);

private:
    // [first, last): stages of a block.
    struct StageSpan {
        std::size_t first, last;
    };

    // One walk over the batches of the quantized path and, with error propagation, of the original one.
    struct Passes {
        CalibrationBatches::Pass quantized;
        std::optional<CalibrationBatches::Pass> original;
    };

    bool quantizes(int block, std::size_t stage) const {
        return options_.scheme.options_at(block, stage).has_value();
    }
    void quantize_stage(int block, std::size_t stage, BlockWeights& weights, const StageDone& done);
    void leave_stage(int block, std::size_t stage, BlockWeights& weights);
    void quantize_at_once(int block, BlockWeights& weights, const StageDone& done);
    void use_original(LinearWeights& linear);
    std::vector<ReducedHessian> reduce_hessians(int block, StageSpan stages, const BlockWeights& weights);
    // Brings a batch from where the pass began to the input of `stage`.
    void recompute(std::size_t stage, const BlockWeights& weights, const BatchState& state);
    void accumulate_shard(int block, std::size_t shard, StageSpan stages, const BlockWeights& weights,
                          Passes& passes, std::vector<ReducedHessian>& hessians);
    // A stage's input on the original path, which then moves past the stage if `runs`; the caller may change
    // it, and it is valid until the next call.
    TensorView original_input(int block, std::size_t stage, const BlockWeights& weights,
                              const BatchState& state, bool runs);
    void make_originals(std::size_t stage, BlockWeights& weights);
    void drop_originals(StageSpan stages, BlockWeights& weights);
    void close_shard(int block, std::size_t shard, StageSpan stages, std::vector<ReducedHessian>& hessians);
    void agree_on_exponents(std::vector<ReducedHessian>& hessians);
    void sum_over_ranks(std::vector<ReducedHessian>& hessians);

    FactorOutcome factor(int block, std::size_t stage, ReducedHessian& hessian);
    QuantizedGroup quantize_group(int block, std::size_t stage, int owner, FactorOutcome outcome,
                                  ReducedHessian& hessian, BlockWeights& weights);
    void use_quantized(std::size_t stage, const QuantizedLinear& quantized, BlockWeights& weights);
    void advance(int block, StageSpan stages, const BlockWeights& weights);
    void pass_through(CalibrationBatches& batches, bool original, int block, StageSpan stages,
                      const BlockWeights& weights);
    void take_slowest(StageSeconds& seconds);
    void report(int block, std::size_t stage, const char* doing);

    Backend& backend_;
    Team all_;
    Team rows_;
    Coordinator& coordinator_;
    const ModelGraph& graph_;
    Options options_;
    std::int64_t job_shards_;
    std::span<const BatchShard> shards_;  // of this rank
    GroupSolver solver_;
    CalibrationBatches batches_;
    BlockForward forward_;
    std::optional<CalibrationBatches> original_batches_;  // of the original path, with error propagation
    Tensor original_norm_;  // [largest micro-batch, hidden_size]: an input of the original path
    Tensor trial_hidden_;   // [largest micro-batch, hidden_size]: a block run ahead without moving `hidden`
    StageClock clock_;
};

}  // namespace quantmill
