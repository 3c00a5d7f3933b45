#include "workers/hessian_stream.h"

#include "pipeline/stopwatch.h"
#include "workers/calibration_batches.h"
#include "workers/message.h"

namespace quantmill {
namespace {

// "model.layers.3.self_attn.q_proj": what messages call a Hessian.
std::string module_of(const ModelGraph& graph, int block, std::size_t stage) {
    return graph.in_block(block, graph.stages_of(block)[stage].group.linears.front().name);
}

}  // namespace

HessianStream::HessianStream(Backend& backend, const ModelGraph& graph, const LayerPlan& plan,
                             LayerLinks& links, int rank, Coordinator& coordinator,
                             std::span<const BatchShard> shards,
                             const std::vector<std::vector<std::int32_t>>& sequences,
                             std::int64_t probe_tokens)
    : backend_(backend),
      graph_(graph),
      links_(links),
      coordinator_(coordinator),
      shards_(shards),
      sequences_(sequences),
      group_(plan.group_of(rank)),
      sweeps_(plan.sweeps.size()),
      last_block_(plan.sweeps.back().back().end - 1),
      job_shards_(static_cast<std::int64_t>(shards.size())),
      probe_tokens_(probe_tokens),
      hidden_(backend, graph.hidden_size, plan, rank, links, shards),
      forward_(backend, graph, limits_of(shards).tokens, limits_of(shards).length),
      carried_(backend, {limits_of(shards).tokens, BlockForward::carried_width(graph)},
               backend.activation_dtype(), "inputs carried between stages") {}

void HessianStream::run(std::size_t sweep, ConstTensorView embedding, std::vector<HeldBlock>& held) {
    prepare(held);
    agreed_ = false;
    hidden_.begin(sweep);
    const std::vector<StreamItem>& items = hidden_.items();
    for (std::size_t i = 0; i < items.size(); ++i) {
        report(sweep, i);
        const Stopwatch wait;
        const TensorView hidden = hidden_.take(i);
        seconds_waited_ += wait.seconds();
        if (hidden_.embeds()) backend_.embed(tokens_of(*items[i].batch, sequences_), embedding, hidden);
        compute(items[i], hidden, held);
        hidden_.pass(i);
        if (items[i].closes_shard) close_shard(shards_[items[i].shard], held);
    }
    if (!agreed_) agree_on_exponents(held);  // a rank without shards
    const Stopwatch wait;
    hidden_.end();
    seconds_waited_ += wait.seconds();
    if (probe_tokens_ > 0) share_probes(held);
}

// The rank of the first shard has seen them.
void HessianStream::share_probes(std::vector<HeldBlock>& held) {
    const Team group = links_.group();
    for (HeldBlock& block : held)
        group.communicator.broadcast(block.probe_input, shard_owner(0, group.control.size()));
}

void HessianStream::prepare(std::vector<HeldBlock>& held) const {
    for (HeldBlock& block : held) {
        for (auto& stage : block.weights.stages) {
            for (LinearWeights& linear : stage) {
                linear.forward =
                    backend_.empty(linear.stored.shape(), backend_.activation_dtype(), "weights of a linear");
                backend_.convert(linear.stored, linear.forward);
            }
        }
        if (probe_tokens_ > 0) {
            block.probe_input =
                backend_.empty({probe_tokens_, graph_.hidden_size}, backend_.activation_dtype(),
                               "hidden states of the first tokens");
        }
        for (const Stage& stage : graph_.stages_of(block.block)) {
            block.hessians.push_back({HessianAccumulator(backend_, stage.group.columns(), job_shards_), {}});
        }
    }
}

void HessianStream::report(std::size_t sweep, std::size_t item) {
    const std::size_t items = hidden_.items().size();
    const double part =
        (static_cast<double>(sweep) + kStreamShare * static_cast<double>(item) / static_cast<double>(items)) /
        static_cast<double>(sweeps_);
    const std::string which = sweeps_ > 1 ? fmt::format("sweep {}/{}, ", sweep + 1, sweeps_) : "";
    coordinator_.report(fmt::format("streaming, {}micro-batch {}/{}", which, item + 1, items), part);
}

void HessianStream::compute(const StreamItem& item, TensorView hidden, std::vector<HeldBlock>& held) {
    const TensorView carried = carried_.view().leading({hidden.extent(0), carried_.shape()[1]});
    const bool first = item.batch == shards_.front().micro_batches.data();
    for (HeldBlock& block : held) {
        if (first && probe_tokens_ > 0) backend_.copy(hidden.rows(0, probe_tokens_), block.probe_input);
        run_block(block, *item.batch, {&item.batch->sequences, hidden, carried});
    }
}

void HessianStream::run_block(HeldBlock& held, const MicroBatch& batch, const BatchState& state) {
    const std::vector<Stage>& stages = graph_.stages_of(held.block);
    for (std::size_t stage = 0; stage < stages.size(); ++stage) {
        StageSeconds& seconds = held.seconds[stage];
        Stopwatch watch;
        const TensorView input = forward_.stage_input(stages[stage], held.weights, state);
        seconds.forward += watch.restart();
        add_inputs(held.hessians[stage].accumulator, input, module_of(graph_, held.block, stage), batch);
        seconds.hessian += watch.restart();
        // Nobody reads what the model's last linears put out.
        const bool last = held.block == last_block_ && stage + 1 == stages.size();
        if (!last) forward_.run_stage(stage, input, held.weights, state);
        seconds.forward += watch.seconds();
    }
}

void HessianStream::close_shard(const BatchShard& shard, std::vector<HeldBlock>& held) {
    if (!agreed_) agree_on_exponents(held);
    for_each_hessian(held, [&](HeldBlock& block, std::size_t stage) {
        const Stopwatch watch;
        ReducedHessian& hessian = block.hessians[stage];
        if (!hessian.accumulator.close_shard(hessian.exponents)) {
            refuse_shard(module_of(graph_, block.block, stage), shard);
        }
        block.seconds[stage].hessian += watch.seconds();
    });
}

// The first rank of the group has the job's first shard open when every other one has its own first.
void HessianStream::agree_on_exponents(std::vector<HeldBlock>& held) {
    Control& control = links_.group().control;
    FixedPointExponents all;
    for_each_hessian(held, [&](HeldBlock& block, std::size_t stage) {
        if (control.rank() != 0) return;
        const FixedPointExponents chosen =
            choose_exponents(block.hessians[stage].accumulator.open_diagonal());
        all.insert(all.end(), chosen.begin(), chosen.end());
    });
    all = from_message<std::int32_t>(control.broadcast(as_message(all), 0));
    auto next = all.begin();
    for_each_hessian(held, [&](HeldBlock& block, std::size_t stage) {
        const auto end = next + graph_.stages_of(block.block)[stage].group.columns();
        block.hessians[stage].exponents.assign(next, end);
        next = end;
    });
    agreed_ = true;
}

}  // namespace quantmill
