#include "workers/worker.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "workers/message.h"
#include "workers/placement.h"

namespace quantmill {
namespace {

std::span<const BatchShard> own(std::span<const BatchShard> shards, const Control& control) {
    const RowRange mine =
        shards_of_rank(static_cast<std::int64_t>(shards.size()), control.rank(), control.size());
    return shards.subspan(static_cast<std::size_t>(mine.begin), static_cast<std::size_t>(mine.count()));
}

}  // namespace

Worker::Worker(Backend& backend, Team all, Team rows, Coordinator& coordinator, const ModelGraph& graph,
               const Options& options, std::span<const BatchShard> shards)
    : backend_(backend),
      all_(all),
      rows_(rows),
      coordinator_(coordinator),
      graph_(graph),
      options_(options),
      job_shards_(static_cast<std::int64_t>(shards.size())),
      shards_(own(shards, all.control)),
      solver_(backend, graph, options.scheme, tokens_of_shards(shards)),
      batches_(backend, graph, own(shards, all.control), options.activations),
      forward_(backend, graph, limits_of(shards).tokens, limits_of(shards).length),
      clock_(backend) {
    const Shape norm{limits_of(shards).tokens, graph.hidden_size};
    if (options.scheme.usual().error_propagation_alpha > 0.0) {
        original_batches_.emplace(backend, graph, own(shards, all.control), options.activations);
        original_norm_ = backend.empty(norm, backend.activation_dtype(), "an input of the original path");
    }
    if (!options.true_sequential) {
        trial_hidden_ = backend.empty(norm, backend.activation_dtype(), "trial hidden states");
    }
}

void Worker::embed(const std::vector<std::vector<std::int32_t>>& sequences, ConstTensorView table) {
    batches_.embed(sequences, table);
    if (original_batches_) original_batches_->embed(sequences, table);
}

void Worker::report(int block, std::size_t stage, const char* doing) {
    const std::vector<Stage>& stages = graph_.stages_of(block);
    const double part = static_cast<double>(stage) / static_cast<double>(stages.size());
    coordinator_.report(fmt::format("block {} {}: {}", block, stages[stage].group.name, doing),
                        (block + part) / options_.scheme.blocks());
}

void Worker::quantize_block(int block, BlockWeights& weights, const StageDone& done) {
    const std::size_t stages = graph_.stages_of(block).size();
    if (!options_.true_sequential && stages > 1) return quantize_at_once(block, weights, done);
    for (std::size_t stage = 0; stage < stages; ++stage) {
        quantize_stage(block, stage, weights, done);
        if (block < graph_.blocks) advance(block, {stage, stage + 1}, weights);
    }
}

void Worker::quantize_stage(int block, std::size_t stage, BlockWeights& weights, const StageDone& done) {
    const bool head = block == graph_.blocks;
    if (!head) make_originals(stage, weights);
    if (!quantizes(block, stage)) {
        leave_stage(block, stage, weights);
        return done(stage, nullptr);
    }
    auto hessians = reduce_hessians(block, {stage, stage + 1}, weights);
    if (!head) drop_originals({stage, stage + 1}, weights);
    const int owner = factor_rank(block, stage, graph_.stages_of(block).size(), all_.control.size());
    FactorOutcome outcome;
    if (all_.control.rank() == owner) outcome = factor(block, stage, hessians.front());
    const QuantizedGroup result =
        quantize_group(block, stage, owner, std::move(outcome), hessians.front(), weights);
    done(stage, &result);
}

// The original path, which a pass for Hessians would have moved on, is moved on its own.
void Worker::leave_stage(int block, std::size_t stage, BlockWeights& weights) {
    for (LinearWeights& linear : weights.stages[stage]) use_original(linear);
    if (!original_batches_) return;
    pass_through(*original_batches_, true, block, {stage, stage + 1}, weights);
    drop_originals({stage, stage + 1}, weights);
}

void Worker::use_original(LinearWeights& linear) {
    if (linear.forward.empty()) {
        linear.forward = backend_.empty(linear.stored.shape(), backend_.activation_dtype(), "weights");
        backend_.convert(linear.stored, linear.forward);
    }
    linear.stored = {};
}

// All Hessians of the block come from its unquantized linears, so that they are factored on different ranks
// at the same time.
void Worker::quantize_at_once(int block, BlockWeights& weights, const StageDone& done) {
    const std::size_t stages = graph_.stages.size();
    for (auto& stage : weights.stages) {
        for (LinearWeights& linear : stage) {
            linear.forward = backend_.empty(linear.stored.shape(), backend_.activation_dtype(), "weights");
            backend_.convert(linear.stored, linear.forward);
        }
    }
    auto hessians = reduce_hessians(block, {0, stages}, weights);
    std::vector<double> costs;
    for (const Stage& stage : graph_.stages) {
        costs.push_back(std::pow(static_cast<double>(stage.group.columns()), 3));
    }
    const std::vector<int> owners = longest_first(costs, all_.control.size());
    std::vector<FactorOutcome> outcomes(stages);
    for (std::size_t stage = 0; stage < stages; ++stage) {
        const bool mine = owners[stage] == all_.control.rank() && quantizes(block, stage);
        if (mine) outcomes[stage] = factor(block, stage, hessians[stage]);
    }
    for (std::size_t stage = 0; stage < stages; ++stage) {
        if (!quantizes(block, stage)) {
            for (LinearWeights& linear : weights.stages[stage]) use_original(linear);
            done(stage, nullptr);
            continue;
        }
        const QuantizedGroup result =
            quantize_group(block, stage, owners[stage], std::move(outcomes[stage]), hessians[stage], weights);
        done(stage, &result);
    }
    advance(block, {0, stages}, weights);
}

std::vector<ReducedHessian> Worker::reduce_hessians(int block, StageSpan stages,
                                                    const BlockWeights& weights) {
    std::vector<ReducedHessian> hessians;
    for (std::size_t stage = stages.first; stage < stages.last; ++stage) {
        const std::int64_t columns = graph_.stages_of(block)[stage].group.columns();
        hessians.push_back({HessianAccumulator(backend_, columns, job_shards_), {}});
        if (original_batches_) hessians.back().cross.emplace(backend_, columns, job_shards_);
    }
    const bool keeps_carried = options_.activations.keeps_carried;
    const std::size_t first = first_of_pass(graph_, stages.first, keeps_carried);
    Passes passes{{batches_, use_of_input(graph_, first)}, {}};
    if (original_batches_) {
        const bool head = block == graph_.blocks;
        passes.original.emplace(*original_batches_,
                                head ? use_of_input(graph_, first)
                                     : use_of_original(graph_, stages.first, stages.last, keeps_carried));
    }
    clock_.start();
    // Rank 0 owns the first shard, which fixes the exponents for all.
    if (batches_.shards() > 0) accumulate_shard(block, 0, stages, weights, passes, hessians);
    agree_on_exponents(hessians);
    for (std::size_t shard = 0; shard < batches_.shards(); ++shard) {
        if (shard > 0) accumulate_shard(block, shard, stages, weights, passes, hessians);
        close_shard(block, shard, stages, hessians);
    }
    report(block, stages.first, "summing Hessians over ranks");
    sum_over_ranks(hessians);
    return hessians;
}

void Worker::recompute(std::size_t stage, const BlockWeights& weights, const BatchState& state) {
    const std::size_t first = first_of_pass(graph_, stage, options_.activations.keeps_carried);
    for (std::size_t before = first; before < stage; ++before) {
        const TensorView input = forward_.stage_input(graph_.stages[before], weights, state);
        forward_.run_stage(before, input, weights, state);
    }
}

void Worker::accumulate_shard(int block, std::size_t shard, StageSpan stages, const BlockWeights& weights,
                              Passes& passes, std::vector<ReducedHessian>& hessians) {
    const bool whole_block = stages.last - stages.first > 1;
    const bool runs =
        block < graph_.blocks && keeps_result(graph_, stages.last, options_.activations.keeps_carried);
    for (std::size_t batch = batches_.first_of(shard); batch < batches_.first_of(shard + 1); ++batch) {
        report(block, stages.first, "forward and Hessian");
        BatchState state = passes.quantized.next();
        BatchState original = passes.original ? passes.original->next() : BatchState{};
        original.original = options_.true_sequential;  // else no linear of the block is quantized yet
        if (whole_block) {
            const TensorView trial = trial_hidden_.view().leading(state.hidden.shape());
            backend_.copy(state.hidden, trial);
            state.hidden = trial;
        }
        recompute(stages.first, weights, state);
        if (passes.original) recompute(stages.first, weights, original);
        for (std::size_t stage = stages.first; stage < stages.last; ++stage) {
            ReducedHessian& hessian = hessians[stage - stages.first];
            const TensorView unquantized =
                hessian.cross ? original_input(block, stage, weights, original, runs) : TensorView{};
            const TensorView input = forward_.stage_input(graph_.stages_of(block)[stage], weights, state);
            clock_.lap(&StageSeconds::forward);
            add_inputs(hessian.accumulator, input, solver_.module(block, stage),
                       batches_.batches()[batch].plan);
            if (hessian.cross) hessian.cross->add(unquantized, input);
            clock_.lap(&StageSeconds::hessian);
            if (!whole_block || stage + 1 == stages.last) continue;
            forward_.run_stage(stage, input, weights, state);
            clock_.lap(&StageSeconds::forward);
        }
    }
}

TensorView Worker::original_input(int block, std::size_t stage, const BlockWeights& weights,
                                  const BatchState& state, bool runs) {
    const Stage& of_block = graph_.stages_of(block)[stage];
    const TensorView input = forward_.stage_input(of_block, weights, state);
    if (runs) forward_.run_stage(stage, input, weights, state);
    if (of_block.input != StageInput::norm) return input;
    const TensorView kept = original_norm_.view().leading(input.shape());  // the other path norms there too
    backend_.copy(input, kept);
    return kept;
}

// Also what `stored` is about to lose: a later stage's pass may have to run this one again.
void Worker::make_originals(std::size_t stage, BlockWeights& weights) {
    if (!original_batches_) return;
    for (LinearWeights& linear : weights.stages[stage]) {
        linear.original = backend_.empty(linear.stored.shape(), backend_.activation_dtype(), "weights");
        backend_.convert(linear.stored, linear.original);
    }
}

void Worker::drop_originals(StageSpan stages, BlockWeights& weights) {
    const bool keeps_carried = options_.activations.keeps_carried;
    if (!keeps_result(graph_, stages.last, keeps_carried)) return;
    const std::size_t first = first_of_pass(graph_, stages.first, keeps_carried);
    for (std::size_t stage = first; stage < stages.last; ++stage) {
        for (LinearWeights& linear : weights.stages[stage]) linear.original = {};
    }
}

void Worker::close_shard(int block, std::size_t shard, StageSpan stages,
                         std::vector<ReducedHessian>& hessians) {
    for (std::size_t i = 0; i < hessians.size(); ++i) {
        ReducedHessian& hessian = hessians[i];
        const bool closed = hessian.accumulator.close_shard(hessian.exponents) &&
                            (!hessian.cross || hessian.cross->close_shard(hessian.exponents));
        if (!closed) refuse_shard(solver_.module(block, stages.first + i), shards_[shard]);
    }
    clock_.lap(&StageSeconds::hessian);
}

void Worker::agree_on_exponents(std::vector<ReducedHessian>& hessians) {
    for (ReducedHessian& hessian : hessians) {
        FixedPointExponents chosen;
        if (all_.control.rank() == 0) {
            chosen = choose_exponents(hessian.accumulator.open_diagonal());
        }
        hessian.exponents = from_message<std::int32_t>(all_.control.broadcast(as_message(chosen), 0));
    }
}

void Worker::sum_over_ranks(std::vector<ReducedHessian>& hessians) {
    clock_.start();
    agree_on_levels(all_.control, hessians);
    for (ReducedHessian& hessian : hessians) {
        const auto sum_up = [&](TensorView sum) { all_.communicator.all_sum(sum); };
        if (hessian.cross) {
            hessian.cross->for_each_sum(sum_up);
            solver_.finish(*hessian.cross, hessian.exponents);
        }
        hessian.accumulator.for_each_sum(sum_up);
        hessian.accumulator.merge_levels(hessian.exponents);
    }
    clock_.lap(&StageSeconds::hessian);
}

FactorOutcome Worker::factor(int block, std::size_t stage, ReducedHessian& hessian) {
    report(block, stage, "factoring its Hessian");
    clock_.start();
    FactorOutcome outcome = solver_.factor(block, stage, hessian);
    clock_.lap(&StageSeconds::factor);
    return outcome;
}

QuantizedGroup Worker::quantize_group(int block, std::size_t stage, int owner, FactorOutcome outcome,
                                      ReducedHessian& hessian, BlockWeights& weights) {
    clock_.start();
    const TensorView factor = hessian.accumulator.workspace();
    outcome = GroupSolver::share(all_, owner, outcome, factor);
    const Tensor damped = solver_.share_damped(all_, owner, block, stage, outcome, &hessian);
    clock_.lap(&StageSeconds::factor);
    report(block, stage, "solving rows");
    const ConstTensorView cross = hessian.cross ? hessian.cross->workspace() : ConstTensorView{};
    QuantizedGroup result =
        solver_.solve(rows_, block, stage, weights.stages[stage], factor, outcome, cross, damped);
    if (block < graph_.blocks) use_quantized(stage, result.quantized, weights);
    clock_.lap(&StageSeconds::solve);
    result.seconds = clock_.take();
    take_slowest(result.seconds);
    return result;
}

// From here on the forward pass multiplies with what the file will hold.
void Worker::use_quantized(std::size_t stage, const QuantizedLinear& quantized, BlockWeights& weights) {
    std::int64_t row = 0;
    for (LinearWeights& linear : weights.stages[stage]) {
        const std::int64_t rows = linear.stored.shape()[0];
        linear.forward = forward_weights(backend_, quantized, row, row + rows);
        linear.stored = {};
        row += rows;
    }
}

void Worker::advance(int block, StageSpan stages, const BlockWeights& weights) {
    clock_.start();
    pass_through(batches_, false, block, stages, weights);
    clock_.lap(&StageSeconds::forward);
}

void Worker::pass_through(CalibrationBatches& batches, bool original, int block, StageSpan stages,
                          const BlockWeights& weights) {
    const bool keeps_carried = options_.activations.keeps_carried;
    if (!keeps_result(graph_, stages.last, keeps_carried)) return;  // the next pass recomputes it
    const StateUse use =
        use_of_stages(graph_, first_of_pass(graph_, stages.first, keeps_carried), stages.last);
    batches.for_each(use, [&](const CalibrationBatches::Batch&, BatchState state) {
        report(block, stages.last - 1,
               original ? "forward through original linears" : "forward through quantized linears");
        state.original = original;
        recompute(stages.first, weights, state);
        for (std::size_t stage = stages.first; stage < stages.last; ++stage) {
            const TensorView input = forward_.stage_input(graph_.stages[stage], weights, state);
            forward_.run_stage(stage, input, weights, state);
        }
    });
}

void Worker::take_slowest(StageSeconds& seconds) {
    const auto micro = [](double s) { return std::llround(s * 1e6); };
    const auto slowest = all_.control.all_max(
        {micro(seconds.forward), micro(seconds.hessian), micro(seconds.factor), micro(seconds.solve)});
    const auto back = [&](std::size_t i) { return static_cast<double>(slowest[i]) * 1e-6; };
    seconds = {back(0), back(1), back(2), back(3)};
}

}  // namespace quantmill
