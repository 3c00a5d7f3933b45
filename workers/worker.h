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
#include "workers/stage_clock.h"

namespace quantmill {

// A LinearGroup after its solve; every rank holds all rows.
struct QuantizedGroup {
    QuantizedLinear quantized;  // rows of all linears, one below the other
    FactorOutcome outcome;
    std::vector<double> loss;           // a linear
    std::vector<double> squared_error;  // a linear
    StageSeconds seconds;               // of the slowest rank
};

// One rank's part in quantizing a block: its batch shards, its rows, its turn at factoring. All ranks call
// alike.
class Worker {
public:
    struct Options {
        GptqOptions gptq;  // grid.group_size as in the job: -1 is one group a row
        bool true_sequential = true;
        std::int64_t device_tokens = CalibrationBatches::kAllTokens;  // whose activations stay on the device
    };
    // `shards`: all of the job.
    Worker(Backend& backend, Control& control, Communicator& communicator, const ModelGraph& graph,
           const Options& options, std::span<const BatchShard> shards);

    void embed(const std::vector<std::vector<std::int32_t>>& sequences, ConstTensorView table);

    // Quantizes the stages of a block in order, hands each group to `done`, and moves the hidden states past
    // the block. Consumes the stored weights.
    using StageDone = std::function<void(std::size_t stage, const QuantizedGroup& group)>;
    void quantize_block(int block, BlockWeights& weights, const StageDone& done);

private:
    struct ReducedHessian {
        HessianAccumulator accumulator;
        FixedPointExponents exponents;
    };
    // [first, last): stages of a block.
    struct StageSpan {
        std::size_t first, last;
    };

    std::vector<ReducedHessian> reduce_hessians(int block, StageSpan stages, const BlockWeights& weights);
    bool try_hessians(int block, StageSpan stages, const BlockWeights& weights, int headroom,
                      std::vector<ReducedHessian>& hessians);
    void accumulate_shard(std::size_t shard, StageSpan stages, const BlockWeights& weights,
                          CalibrationBatches::Pass& pass, std::vector<ReducedHessian>& hessians);
    bool close_shard(std::vector<ReducedHessian>& hessians);
    void agree_on_exponents(int block, StageSpan stages, int headroom, std::vector<ReducedHessian>& hessians);

    QuantizedGroup quantize_group(int block, std::size_t stage, ReducedHessian& hessian,
                                  BlockWeights& weights);
    FactorOutcome factor(int block, std::size_t stage, ReducedHessian& hessian, const GptqOptions& options);
    RowLosses solve(const LinearGroup& group, const std::vector<LinearWeights>& weights,
                    ConstTensorView factor, const FactorOutcome& outcome, const GptqOptions& options,
                    QuantizedLinear& quantized);
    Tensor stored_rows(const LinearGroup& group, const std::vector<LinearWeights>& weights, RowRange range);
    void use_quantized(std::size_t stage, const QuantizedLinear& quantized, BlockWeights& weights);
    void advance(StageSpan stages, const BlockWeights& weights);
    void take_slowest(StageSeconds& seconds);
    std::string module(int block, std::size_t stage) const;

    Backend& backend_;
    Control& control_;
    Communicator& communicator_;
    const ModelGraph& graph_;
    Options options_;
    std::int64_t job_shards_;
    std::int64_t job_tokens_;
    CalibrationBatches batches_;
    BlockForward forward_;
    Tensor trial_hidden_;  // [largest micro-batch, hidden_size]: a block run ahead without moving `hidden`
    StageClock clock_;
};

}  // namespace quantmill
