#include "workers/worker.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "pipeline/output_layout.h"
#include "workers/placement.h"

namespace quantmill {
namespace {

// Bits of resolution given up at each overflow of the fixed-point sum, and how many in all.
constexpr int kHeadroomStep = 12;
constexpr int kMostHeadroom = 36;

std::span<const BatchShard> own(std::span<const BatchShard> shards, const Control& control) {
    const RowRange mine =
        shards_of_rank(static_cast<std::int64_t>(shards.size()), control.rank(), control.size());
    return shards.subspan(static_cast<std::size_t>(mine.begin), static_cast<std::size_t>(mine.count()));
}

std::int64_t count_tokens(std::span<const BatchShard> shards) {
    return std::accumulate(shards.begin(), shards.end(), std::int64_t{0},
                           [](std::int64_t sum, const BatchShard& shard) { return sum + shard.tokens(); });
}

template <class T>
std::string as_message(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

template <class T>
std::vector<T> from_message(const std::string& message) {
    std::vector<T> values(message.size() / sizeof(T));
    std::copy_n(message.data(), message.size(), reinterpret_cast<char*>(values.data()));
    return values;
}

// Sums rows of each linear in row order, so that the result does not depend on who solved which rows.
std::vector<double> sum_by_linear(const LinearGroup& group, const std::vector<double>& rows) {
    std::vector<double> sums;
    auto row = rows.begin();
    for (const Linear& linear : group.linears) {
        sums.push_back(std::accumulate(row, row + linear.rows, 0.0));
        row += linear.rows;
    }
    return sums;
}

std::vector<double> gather_rows(Control& control, const std::vector<double>& mine) {
    std::vector<double> all;
    for (const std::string& message : control.all_gather(as_message(mine))) {
        const auto part = from_message<double>(message);
        all.insert(all.end(), part.begin(), part.end());
    }
    return all;
}

}  // namespace

Worker::Worker(Backend& backend, Control& control, Communicator& communicator, const ModelGraph& graph,
               const Options& options, std::span<const BatchShard> shards)
    : backend_(backend),
      control_(control),
      communicator_(communicator),
      graph_(graph),
      options_(options),
      job_shards_(static_cast<std::int64_t>(shards.size())),
      job_tokens_(count_tokens(shards)),
      batches_(backend, graph, own(shards, control), options.device_tokens),
      forward_(backend, graph, limits_of(shards).tokens, limits_of(shards).length),
      clock_(backend) {
    if (!options.true_sequential) {
        trial_hidden_ = backend.empty({limits_of(shards).tokens, graph.hidden_size},
                                      backend.activation_dtype(), "trial hidden states");
    }
}

void Worker::embed(const std::vector<std::vector<std::int32_t>>& sequences, ConstTensorView table) {
    batches_.embed(sequences, table);
}

std::string Worker::module(int block, std::size_t stage) const {
    return graph_.in_block(block, graph_.stages[stage].group.linears.front().name);
}

void Worker::quantize_block(int block, BlockWeights& weights, const StageDone& done) {
    const std::size_t stages = graph_.stages.size();
    if (options_.true_sequential) {
        for (std::size_t stage = 0; stage < stages; ++stage) {
            auto hessians = reduce_hessians(block, {stage, stage + 1}, weights);
            done(stage, quantize_group(block, stage, hessians.front(), weights));
            advance({stage, stage + 1}, weights);
        }
        return;
    }
    for (auto& stage : weights.stages) {
        for (LinearWeights& linear : stage) {
            linear.forward = backend_.empty(linear.stored.shape(), backend_.activation_dtype(), "weights");
            backend_.convert(linear.stored, linear.forward);
        }
    }
    auto hessians = reduce_hessians(block, {0, stages}, weights);
    for (std::size_t stage = 0; stage < stages; ++stage) {
        done(stage, quantize_group(block, stage, hessians[stage], weights));
    }
    advance({0, stages}, weights);
}

std::vector<Worker::ReducedHessian> Worker::reduce_hessians(int block, StageSpan stages,
                                                            const BlockWeights& weights) {
    std::vector<ReducedHessian> hessians;
    for (std::size_t stage = stages.first; stage < stages.last; ++stage) {
        hessians.push_back(
            {HessianAccumulator(backend_, graph_.stages[stage].group.columns(), job_shards_), {}});
    }
    for (int headroom = 0; headroom <= kMostHeadroom; headroom += kHeadroomStep) {
        if (try_hessians(block, stages, weights, headroom, hessians)) {
            clock_.start();
            for (ReducedHessian& hessian : hessians) communicator_.all_sum(hessian.accumulator.sum());
            clock_.lap(&StageSeconds::hessian);
            return hessians;
        }
        for (ReducedHessian& hessian : hessians) hessian.accumulator.restart();
    }
    throw BadInput("{}: its calibration inputs are not finite or differ by more than 2^{} between sequences",
                   module(block, stages.first), kMostHeadroom);
}

bool Worker::try_hessians(int block, StageSpan stages, const BlockWeights& weights, int headroom,
                          std::vector<ReducedHessian>& hessians) {
    bool fits = true;
    CalibrationBatches::Pass pass(batches_, use_of_input(graph_, stages.first));
    clock_.start();
    // Rank 0 owns the first shard, which fixes the exponents for all.
    if (batches_.shards() > 0) accumulate_shard(0, stages, weights, pass, hessians);
    agree_on_exponents(block, stages, headroom, hessians);
    for (std::size_t shard = 0; shard < batches_.shards() && fits; ++shard) {
        if (shard > 0) accumulate_shard(shard, stages, weights, pass, hessians);
        fits = close_shard(hessians);
    }
    return control_.all_max({fits ? 0 : 1}).front() == 0;
}

void Worker::accumulate_shard(std::size_t shard, StageSpan stages, const BlockWeights& weights,
                              CalibrationBatches::Pass& pass, std::vector<ReducedHessian>& hessians) {
    const bool whole_block = stages.last - stages.first > 1;
    for (std::size_t batch = batches_.first_of(shard); batch < batches_.first_of(shard + 1); ++batch) {
        BatchState state = pass.next();
        if (whole_block) {
            const TensorView trial = trial_hidden_.view().leading(state.hidden.shape());
            backend_.copy(state.hidden, trial);
            state.hidden = trial;
        }
        for (std::size_t stage = stages.first; stage < stages.last; ++stage) {
            const TensorView input = forward_.stage_input(graph_.stages[stage], weights, state);
            clock_.lap(&StageSeconds::forward);
            hessians[stage - stages.first].accumulator.add(input);
            clock_.lap(&StageSeconds::hessian);
            if (!whole_block || stage + 1 == stages.last) continue;
            forward_.run_stage(stage, input, weights, state);
            clock_.lap(&StageSeconds::forward);
        }
    }
}

bool Worker::close_shard(std::vector<ReducedHessian>& hessians) {
    bool fits = true;
    for (ReducedHessian& hessian : hessians) {
        fits = fits && hessian.accumulator.close_shard(hessian.exponents);
    }
    clock_.lap(&StageSeconds::hessian);
    return fits;
}

void Worker::agree_on_exponents(int block, StageSpan stages, int headroom,
                                std::vector<ReducedHessian>& hessians) {
    for (std::size_t i = 0; i < hessians.size(); ++i) {
        FixedPointExponents chosen;
        if (control_.rank() == 0) {
            const std::vector<float> diagonal = hessians[i].accumulator.open_diagonal();
            const bool finite =
                std::all_of(diagonal.begin(), diagonal.end(), [](float d) { return std::isfinite(d); });
            if (!finite) {
                throw BadInput("{}: its calibration inputs are not finite", module(block, stages.first + i));
            }
            chosen = choose_exponents(diagonal, headroom);
        }
        hessians[i].exponents = from_message<std::int32_t>(control_.broadcast(as_message(chosen), 0));
    }
}

QuantizedGroup Worker::quantize_group(int block, std::size_t stage, ReducedHessian& hessian,
                                      BlockWeights& weights) {
    const LinearGroup& group = graph_.stages[stage].group;
    GptqOptions options = options_.gptq;
    options.grid = grid_for(options.grid.bits, options.grid.group_size, options.grid.sym, group.columns());

    clock_.start();
    FactorOutcome outcome = factor(block, stage, hessian, options);
    clock_.lap(&StageSeconds::factor);

    QuantizedLinear quantized(backend_, group.rows(), group.columns(), options.grid);
    quantized.g_idx = group_index(outcome, options.grid, group.columns());
    const RowLosses mine =
        solve(group, weights.stages[stage], hessian.accumulator.workspace(), outcome, options, quantized);
    const std::vector<RowRange> ranges = solve_ranges(group.rows(), control_.size());
    communicator_.all_gather_rows(quantized.codes, ranges);
    communicator_.all_gather_rows(quantized.scales, ranges);
    communicator_.all_gather_rows(quantized.zeros, ranges);
    const std::vector<double> loss = gather_rows(control_, mine.loss);
    const std::vector<double> squared_error = gather_rows(control_, mine.squared_error);
    use_quantized(stage, quantized, weights);
    clock_.lap(&StageSeconds::solve);

    QuantizedGroup result{std::move(quantized), std::move(outcome), sum_by_linear(group, loss),
                          sum_by_linear(group, squared_error), clock_.take()};
    take_slowest(result.seconds);
    return result;
}

FactorOutcome Worker::factor(int block, std::size_t stage, ReducedHessian& hessian,
                             const GptqOptions& options) {
    const int owner = factor_rank(block, stage, graph_.stages.size(), control_.size());
    FactorOutcome outcome;
    if (control_.rank() == owner) {
        outcome = factor_hessian(backend_, hessian.accumulator.sum(), hessian.exponents, job_tokens_, options,
                                 module(block, stage), hessian.accumulator.workspace());
    }
    outcome = deserialize_factor_outcome(control_.broadcast(serialize(outcome), owner));
    communicator_.broadcast(hessian.accumulator.workspace(), owner);
    return outcome;
}

RowLosses Worker::solve(const LinearGroup& group, const std::vector<LinearWeights>& weights,
                        ConstTensorView factor, const FactorOutcome& outcome, const GptqOptions& options,
                        QuantizedLinear& quantized) {
    const RowRange range =
        solve_ranges(group.rows(), control_.size())[static_cast<std::size_t>(control_.rank())];
    Tensor rows = stored_rows(group, weights, range);
    return solve_rows(backend_, rows, range, factor, outcome, options, quantized);
}

// Rows of the group's linears, one below the other, in fp32.
Tensor Worker::stored_rows(const LinearGroup& group, const std::vector<LinearWeights>& weights,
                           RowRange range) {
    Tensor rows = backend_.empty({range.count(), group.columns()}, DType::f32, "rows to solve");
    std::int64_t first = 0;
    for (std::size_t l = 0; l < group.linears.size(); ++l) {
        const std::int64_t last = first + group.linears[l].rows;
        const std::int64_t begin = std::max(first, range.begin);
        const std::int64_t end = std::min(last, range.end);
        if (begin < end) {
            backend_.convert(weights[l].stored.view().rows(begin - first, end - first),
                             rows.view().rows(begin - range.begin, end - range.begin));
        }
        first = last;
    }
    return rows;
}

// From here on the forward pass multiplies with what the file will hold.
void Worker::use_quantized(std::size_t stage, const QuantizedLinear& quantized, BlockWeights& weights) {
    std::int64_t row = 0;
    for (LinearWeights& linear : weights.stages[stage]) {
        const std::int64_t rows = linear.stored.shape()[0];
        linear.forward =
            backend_.empty(linear.stored.shape(), backend_.activation_dtype(), "quantized weights");
        backend_.dequantize(quantized.rows(row, row + rows), quantized.g_idx, linear.forward);
        linear.stored = {};
        row += rows;
    }
}

void Worker::advance(StageSpan stages, const BlockWeights& weights) {
    clock_.start();
    const StateUse use = use_of_stages(graph_, stages.first, stages.last);
    batches_.for_each(use, [&](const CalibrationBatches::Batch&, const BatchState& state) {
        for (std::size_t stage = stages.first; stage < stages.last; ++stage) {
            const TensorView input = forward_.stage_input(graph_.stages[stage], weights, state);
            forward_.run_stage(stage, input, weights, state);
        }
    });
    clock_.lap(&StageSeconds::forward);
}

void Worker::take_slowest(StageSeconds& seconds) {
    const auto micro = [](double s) { return std::llround(s * 1e6); };
    const auto slowest = control_.all_max(
        {micro(seconds.forward), micro(seconds.hessian), micro(seconds.factor), micro(seconds.solve)});
    const auto back = [&](std::size_t i) { return static_cast<double>(slowest[i]) * 1e-6; };
    seconds = {back(0), back(1), back(2), back(3)};
}

}  // namespace quantmill
