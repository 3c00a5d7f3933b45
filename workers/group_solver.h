#pragma once

#include <optional>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "pipeline/batch_plan.h"
#include "pipeline/block_weights.h"
#include "pipeline/gptq_solver.h"
#include "pipeline/hessian.h"
#include "pipeline/quantization_scheme.h"
#include "workers/stage_clock.h"

namespace quantmill {

// Ranks that work together, and what carries their tensors.
struct Team {
    Control& control;
    Communicator& communicator;
};

// A Hessian summed over all shards of the job, with room for its factor.
struct ReducedHessian {
    HessianAccumulator accumulator;
    FixedPointExponents exponents;
    std::optional<CrossAccumulator> cross = std::nullopt;  // with error propagation
};

// Adds the inputs x of `module` in a micro-batch. Throws BadInput, which names the sequence, when they are
// not finite; so does refuse_shard for a shard that no level holds.
void add_inputs(HessianAccumulator& accumulator, ConstTensorView x, const std::string& module,
                const MicroBatch& batch);
[[noreturn]] void refuse_shard(const std::string& module, const BatchShard& shard);
// Gives the Hessians, and what is beside them, the levels that any rank's have. Collective.
void agree_on_levels(Control& control, std::vector<ReducedHessian>& hessians);

// A LinearGroup after its solve; every rank that solved it holds all rows.
struct QuantizedGroup {
    QuantizedLinear quantized;  // rows of all linears, one below the other
    FactorOutcome outcome;
    std::vector<double> loss;           // a linear
    std::vector<double> squared_error;  // a linear
    double error_propagation_alpha;     // 0: none
    StageSeconds seconds;               // of the slowest rank
};

// From the Hessian of a LinearGroup to its codes, on any ranks: the bytes do not depend on them.
class GroupSolver {
public:
    // `tokens`: of the job. Only for groups that the scheme quantizes.
    GroupSolver(Backend& backend, const ModelGraph& graph, const QuantizationScheme& scheme,
                std::int64_t tokens);

    // Factors a summed Hessian into its workspace. On the calling rank alone.
    FactorOutcome factor(int block, std::size_t stage, ReducedHessian& hessian) const;
    // Brings factor and outcome from `owner` to all ranks of the team. Collective.
    static FactorOutcome share(const Team& team, int owner, const FactorOutcome& outcome, TensorView factor);
    // The damped Hessian for solve(), on all ranks of the team; empty when nothing is refined. `hessian`: on
    // `owner`, with its sum. Collective.
    Tensor share_damped(const Team& team, int owner, int block, std::size_t stage,
                        const FactorOutcome& outcome, ReducedHessian* hessian) const;
    // Each rank of the team solves its rows, then all have all. `factor`: as `factor()` left it, `cross` and
    // `damped`: as solve_rows takes them. Collective.
    QuantizedGroup solve(const Team& team, int block, std::size_t stage,
                         const std::vector<LinearWeights>& weights, ConstTensorView factor,
                         const FactorOutcome& outcome, ConstTensorView cross = {},
                         ConstTensorView damped = {}) const;
    // D of all shards from its sums, in its workspace, for solve(). `exponents`: of the Hessian's level 0.
    void finish(CrossAccumulator& cross, const FixedPointExponents& exponents) const;

    // "model.layers.3.self_attn.q_proj", for messages.
    std::string module(int block, std::size_t stage) const;

private:
    const LinearGroup& group_at(int block, std::size_t stage) const;
    GptqOptions options_at(int block, std::size_t stage) const;
    Tensor stored_rows(const LinearGroup& group, const std::vector<LinearWeights>& weights,
                       RowRange range) const;

    Backend& backend_;
    const ModelGraph& graph_;
    const QuantizationScheme& scheme_;
    std::int64_t tokens_;
};

}  // namespace quantmill
