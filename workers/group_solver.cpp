#include "workers/group_solver.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "pipeline/output_layout.h"
#include "pipeline/refinement.h"
#include "workers/message.h"
#include "workers/placement.h"

namespace quantmill {
namespace {

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

// "sequences 8-15", as they lie in the store.
std::string sequences_text(std::int64_t first, std::int64_t last) {
    const std::string text =
        first == last ? fmt::format("sequence {}", first) : fmt::format("sequences {}-{}", first, last);
    return text + " (counted from 0)";
}

}  // namespace

void add_inputs(HessianAccumulator& accumulator, ConstTensorView x, const std::string& module,
                const MicroBatch& batch) {
    if (accumulator.add(x)) return;
    std::int64_t first = batch.first_sequence;
    std::int64_t last = first + batch.sequences.count() - 1;
    const std::int64_t refused = accumulator.first_refused(x, batch.sequences);
    if (refused < batch.sequences.count()) first = last = first + refused;
    throw BadInput(
        "{}: its calibration inputs are not finite in {}: NaN, infinite, or too large to be squared in fp32",
        module, sequences_text(first, last));
}

void refuse_shard(const std::string& module, const BatchShard& shard) {
    const MicroBatch& end = shard.micro_batches.back();
    throw BadInput(
        "{}: its calibration inputs are 2^36 times as large in {} as in the first ones, or not finite in the "
        "original model",
        module,
        sequences_text(shard.micro_batches.front().first_sequence,
                       end.first_sequence + end.sequences.count() - 1));
}

void agree_on_levels(Control& control, std::vector<ReducedHessian>& hessians) {
    std::vector<ShardAccumulator*> all;
    for (ReducedHessian& hessian : hessians) {
        all.push_back(&hessian.accumulator);
        if (hessian.cross) all.push_back(&*hessian.cross);
    }
    // A bit a level: the maximum of each bit over ranks is their union.
    std::vector<std::int64_t> present;
    for (const ShardAccumulator* accumulator : all) {
        for (unsigned level = 0; level < ShardAccumulator::kLevels; ++level) {
            present.push_back(accumulator->levels() >> level & 1U);
        }
    }
    present = control.all_max(present);
    auto bit = present.begin();
    for (ShardAccumulator* accumulator : all) {
        unsigned levels = 0;
        for (unsigned level = 0; level < ShardAccumulator::kLevels; ++level) {
            levels |= static_cast<unsigned>(*bit++) << level;
        }
        accumulator->require_levels(levels);
    }
}

GroupSolver::GroupSolver(Backend& backend, const ModelGraph& graph, const QuantizationScheme& scheme,
                         std::int64_t tokens)
    : backend_(backend), graph_(graph), scheme_(scheme), tokens_(tokens) {}

const LinearGroup& GroupSolver::group_at(int block, std::size_t stage) const {
    return graph_.stages_of(block)[stage].group;
}

std::string GroupSolver::module(int block, std::size_t stage) const {
    return graph_.in_block(block, group_at(block, stage).linears.front().name);
}

GptqOptions GroupSolver::options_at(int block, std::size_t stage) const {
    GptqOptions options = scheme_.options_at(block, stage).value();
    options.grid = grid_for(options.grid, group_at(block, stage).columns());
    return options;
}

FactorOutcome GroupSolver::factor(int block, std::size_t stage, ReducedHessian& hessian) const {
    return factor_hessian(backend_, hessian.accumulator.sum(), hessian.exponents, tokens_,
                          options_at(block, stage), module(block, stage), hessian.accumulator.workspace());
}

FactorOutcome GroupSolver::share(const Team& team, int owner, const FactorOutcome& outcome,
                                 TensorView factor) {
    FactorOutcome shared = deserialize_factor_outcome(team.control.broadcast(serialize(outcome), owner));
    team.communicator.broadcast(factor, owner);
    return shared;
}

Tensor GroupSolver::share_damped(const Team& team, int owner, int block, std::size_t stage,
                                 const FactorOutcome& outcome, ReducedHessian* hessian) const {
    const LinearGroup& group = group_at(block, stage);
    if (!refines(outcome, options_at(block, stage))) return {};
    Tensor damped = backend_.empty({group.columns(), group.columns()}, DType::f32, "damped Hessian");
    if (team.control.rank() == owner) {
        damped_hessian(backend_, hessian->accumulator.sum(), hessian->exponents, tokens_, outcome, damped);
    }
    team.communicator.broadcast(damped, owner);
    return damped;
}

void GroupSolver::finish(CrossAccumulator& cross, const FixedPointExponents& exponents) const {
    cross.finish(exponents, 2.0 / static_cast<double>(tokens_));
}

QuantizedGroup GroupSolver::solve(const Team& team, int block, std::size_t stage,
                                  const std::vector<LinearWeights>& weights, ConstTensorView factor,
                                  const FactorOutcome& outcome, ConstTensorView cross,
                                  ConstTensorView damped) const {
    const LinearGroup& group = group_at(block, stage);
    const GptqOptions options = options_at(block, stage);
    QuantizedLinear quantized(backend_, group.rows(), group.columns(), options.grid);
    quantized.g_idx = group_index(outcome, options, group.columns());

    const std::vector<RowRange> ranges = solve_ranges(group.rows(), team.control.size());
    const RowRange mine = ranges[static_cast<std::size_t>(team.control.rank())];
    Tensor rows = stored_rows(group, weights, mine);
    const RowLosses losses =
        solve_rows(backend_, rows, mine, factor, outcome, options, quantized, cross, damped);
    team.communicator.all_gather_rows(quantized.codes, ranges);
    team.communicator.all_gather_rows(quantized.scales, ranges);
    team.communicator.all_gather_rows(quantized.zeros, ranges);
    const std::vector<double> loss = gather_rows(team.control, losses.loss);
    const std::vector<double> squared_error = gather_rows(team.control, losses.squared_error);
    return {std::move(quantized),
            outcome,
            sum_by_linear(group, loss),
            sum_by_linear(group, squared_error),
            propagated_alpha(outcome, options),
            {}};
}

// Rows of the group's linears, one below the other, in fp32.
Tensor GroupSolver::stored_rows(const LinearGroup& group, const std::vector<LinearWeights>& weights,
                                RowRange range) const {
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

}  // namespace quantmill
