#include "workers/layer_run.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "kernels/cpu/free_memory.h"
#include "pipeline/fingerprint.h"
#include "pipeline/model_card.h"
#include "pipeline/stopwatch.h"
#include "workers/calibration_batches.h"
#include "workers/layer_planner.h"

namespace quantmill {
namespace {

// The rank of a group that writes a block's Hessians into a store: they lie in one file.
int block_writer(int block, const Control& group) { return block % group.size(); }

// Places of those that factor, by block and stage.
std::map<std::pair<int, std::size_t>, int> leaders_of(const std::vector<SolveTask>& tasks,
                                                      const SolvePlan& plan) {
    std::map<std::pair<int, std::size_t>, int> leaders;
    for (std::size_t team = 0; team < plan.tasks.size(); ++team) {
        for (const std::size_t task : plan.tasks[team]) {
            leaders[{tasks[task].block, tasks[task].stage}] = plan.leader[team];
        }
    }
    return leaders;
}

}  // namespace

HessianOrigin hessian_origin(const PreparedJob& job, Control& control) {
    HessianOrigin origin;
    origin.model_name = base_model_name(job.spec.model);
    origin.model = control.broadcast(control.rank() == 0 ? fingerprint_of_model(job.reader) : "", 0);
    origin.tokens = fingerprint_of_tokens(job.calibration.sequences);
    origin.sequences = static_cast<std::int64_t>(job.calibration.sequences.size());
    origin.token_count = tokens_of_shards(job.shards);
    return origin;
}

std::string hessian_store_obstacle(const PreparedJob& job, Control& control) {
    const CalibrationSpec& spec = job.spec.calibration;
    if (spec.hessians.empty() && spec.save_hessians.empty()) return "";
    const HessianOrigin origin = hessian_origin(job, control);
    std::string obstacle;
    if (control.rank() == 0) {
        try {
            if (!spec.hessians.empty())
                HessianStore(spec.hessians, job.graph, origin, job.head).require_complete();
            if (!spec.save_hessians.empty()) {
                HessianStore(spec.save_hessians, job.graph, origin, job.head).require_no_other();
            }
        } catch (const BadInput& error) {
            obstacle = error.what();
        }
    }
    return control.broadcast(obstacle, 0);
}

void require_hessian_stores(const PreparedJob& job, Control& control) {
    const CalibrationSpec& spec = job.spec.calibration;
    if (spec.hessians.empty() && spec.save_hessians.empty()) return;
    const HessianOrigin origin = hessian_origin(job, control);
    if (control.rank() == 0 && !spec.hessians.empty()) {
        HessianStore(spec.hessians, job.graph, origin, job.head).require_complete();
    }
    if (control.rank() == 0 && !spec.save_hessians.empty()) {
        HessianStore(spec.save_hessians, job.graph, origin, job.head).prepare();
    }
    control.barrier();
}

LayerRun::LayerRun(const std::vector<PreparedJob>& outputs, const LayerPlan& plan, Control& control,
                   Backend& backend, Coordinator& coordinator)
    : outputs_(outputs),
      plan_(plan),
      control_(control),
      backend_(backend),
      coordinator_(coordinator),
      group_(static_cast<std::size_t>(plan.group_of(control.rank()))),
      links_(control, backend, outputs.front().spec.compute.communicator, plan,
             outputs.front().shards.size()),
      loader_(backend, links_.group().control, links_.group().communicator, outputs.front().reader,
              outputs.front().graph),
      reports_(outputs.size()) {
    coordinator.set_group(static_cast<int>(group_));
    for (const PreparedJob& output : outputs) {
        solvers_.emplace_back(backend, output.graph, output.scheme, tokens_of_shards(output.shards));
    }
    const CalibrationSpec& calibration = job().spec.calibration;
    if (!calibration.hessians.empty()) {
        given_ = std::make_unique<HessianStore>(calibration.hessians, job().graph,
                                                hessian_origin(job(), control), job().head);
    }
    if (!calibration.save_hessians.empty()) {
        saved_ = std::make_unique<HessianStore>(calibration.save_hessians, job().graph,
                                                hessian_origin(job(), control), job().head);
    }
    if (job().measures) {
        probe_ = std::make_unique<BlockProbe>(backend, job().graph, job().shards);
        return;
    }
    open_outputs();
    expect_deliveries();
}

void LayerRun::open_outputs() {
    std::vector<CheckpointOutput*> written;
    std::vector<TensorOwners> owners;
    for (std::size_t o = 0; o < outputs_.size(); ++o) {
        const std::vector<int> writers = writers_of(job().graph, backend_.name(), plan_, outputs_[o].layout);
        std::vector<std::size_t> owned;
        for (std::size_t shard = 0; shard < writers.size(); ++shard) {
            if (writers[shard] == control_.rank()) owned.push_back(shard);
        }
        written_.push_back(std::make_unique<CheckpointOutput>(outputs_[o], control_, backend_, owned));
        written.push_back(written_.back().get());
        owners.emplace_back(outputs_[o].layout, writers);
    }
    delivery_ = std::make_unique<TensorDelivery>(control_, written, owners);
}

void LayerRun::expect_deliveries() {
    for_each_solve(job().graph, backend_.name(), plan_, [&](int leader, const SolveTask& task) {
        const std::vector<std::string> tensors = tensors_of(job().graph, task);
        for (std::size_t o = 0; o < outputs_.size(); ++o) {
            if (outputs_[o].scheme.options_at(task.block, task.stage)) delivery_->expect(leader, o, tensors);
        }
    });
}

std::vector<std::vector<LinearReport>> LayerRun::run() {
    const Stopwatch watch;
    if (!job().measures) coordinator_.report("copying tensors that stay as they are", 0.0);
    for (const auto& output : written_) {
        output->pin_ahead();
        output->copy_untouched();
    }
    if (!given_) {
        stream_ = std::make_unique<HessianStream>(backend_, job().graph, plan_, links_, control_.rank(),
                                                  coordinator_, job().shards, job().calibration.sequences,
                                                  probe_ ? probe_->tokens() : 0);
    }
    prefetch(0);
    for (std::size_t sweep = 0; sweep < plan_.sweeps.size(); ++sweep) run_sweep(sweep);
    if (!job().measures) {
        coordinator_.report("writing", 1.0);
        const Stopwatch tail;
        delivery_->finish();
        write_seconds_ = tail.seconds();
    }
    run_seconds_ = watch.seconds();
    std::vector<std::vector<LinearReport>> all;
    for (std::size_t o = 0; o < outputs_.size(); ++o) {
        all.push_back(gather_linears(outputs_[o], control_, reports_[o]));
    }
    return all;
}

void LayerRun::run_sweep(std::size_t sweep) {
    Stopwatch watch;
    std::vector<HeldBlock> held = load_blocks(plan_.sweeps[sweep][group_]);
    Tensor embedding;
    if (!given_ && stream_->needs_embedding(sweep)) {
        embedding = loader_.load(job().graph.embedding, {job().graph.vocab_size, job().graph.hidden_size});
    }
    backend_.synchronize();
    load_seconds_all_ += watch.restart();
    const SweepSolves solves = solves_of(job().graph, backend_.name(), plan_, sweep, group_);
    read_ahead(sweep + 1);
    if (!given_) {
        stream_->run(sweep, embedding, held);
        embedding = {};
        stream_seconds_ += watch.restart();
        reduce(held, solves);
    }
    prefetch(sweep + 1);
    solve(sweep, held, solves);
    solve_seconds_ += watch.seconds();
}

void LayerRun::prefetch(std::size_t sweep) {
    if (sweep >= plan_.sweeps.size() || plan_.sweeps[sweep][group_].empty()) return;
    loader_.prefetch_block(plan_.sweeps[sweep][group_].begin);
}

// The first sweep's blocks have nothing to hide behind; those of later ones are read while this one computes.
void LayerRun::read_ahead(std::size_t sweep) {
    if (sweep >= plan_.sweeps.size()) return;
    const BlockRange next = plan_.sweeps[sweep][group_];
    const std::size_t share = free_host_memory() / static_cast<std::size_t>(control_.local_size());
    loader_.read_ahead(next.begin, next.end, share / 2);
}

std::vector<HeldBlock> LayerRun::load_blocks(BlockRange range) {
    std::vector<HeldBlock> held;
    for (int block = range.begin; block < range.end; ++block) {
        const Stopwatch watch;
        held.push_back({block, loader_.load_block(block), {}, {}, {}, {}});
        held.back().seconds.resize(job().graph.stages_of(block).size());
        if (block + 1 < range.end) loader_.prefetch_block(block + 1);
        load_seconds_[block] = watch.seconds();
    }
    return held;
}

// Sums each Hessian over the ranks of the group, on the rank that will factor it, or write it first.
void LayerRun::reduce(std::vector<HeldBlock>& held, const SweepSolves& solves) {
    const Team group = links_.group();
    const auto leaders = leaders_of(solves.tasks, solves.plan);
    take_slowest(held);
    for (HeldBlock& block : held) agree_on_levels(group.control, block.hessians);
    for_each_hessian(held, [&](HeldBlock& block, std::size_t stage) {
        ReducedHessian& hessian = block.hessians[stage];
        const int owner =
            saved_ ? block_writer(block.block, group.control) : leaders.at({block.block, stage});
        hessian.accumulator.for_each_sum([&](TensorView sum) { group.communicator.sum_to(sum, owner); });
        if (group.control.rank() == owner) {
            hessian.accumulator.merge_levels(hessian.exponents);
        } else {
            hessian.accumulator.release();
        }
    });
    if (!saved_) return;
    save(held);
    hand_over(held, solves);
}

void LayerRun::save(std::vector<HeldBlock>& held) {
    const Control& group = links_.group().control;
    for (HeldBlock& block : held) {
        if (block_writer(block.block, group) != group.rank()) continue;
        coordinator_.report(fmt::format("block {}: saving its Hessians", block.block), solved_);
        std::vector<StoredHessian> stages;
        for (ReducedHessian& hessian : block.hessians) {
            const TensorView sum = hessian.accumulator.sum();
            StoredHessian& stored = stages.emplace_back();
            stored.exponents = hessian.exponents;
            stored.sum.resize(static_cast<std::size_t>(sum.shape().count()));
            backend_.copy_to_host(sum, stored.sum.data());
        }
        saved_->write_block(block.block, stages);
    }
}

// From the rank that wrote a Hessian to the one that factors it.
void LayerRun::hand_over(std::vector<HeldBlock>& held, const SweepSolves& solves) {
    const Team group = links_.group();
    const auto leaders = leaders_of(solves.tasks, solves.plan);
    std::vector<std::unique_ptr<Transfer>> sent;
    for_each_hessian(held, [&](HeldBlock& block, std::size_t stage) {
        const int from = block_writer(block.block, group.control);
        const int to = leaders.at({block.block, stage});
        if (from == to) return;
        ReducedHessian& hessian = block.hessians[stage];
        const std::size_t bytes = hessian.exponents.size() * sizeof(std::int32_t);
        if (group.control.rank() == from) {
            sent.push_back(group.control.start_send_bytes(hessian.exponents.data(), bytes, to));
            sent.push_back(group.communicator.start_send(hessian.accumulator.sum(), to));
        }
        if (group.control.rank() == to) {
            hessian.accumulator.restart();
            group.control.start_receive_bytes(hessian.exponents.data(), bytes, from)->wait();
            group.communicator.start_receive(hessian.accumulator.sum(), from)->wait();
        }
    });
    for (const auto& transfer : sent) transfer->wait();
}

ReducedHessian LayerRun::read_hessian(const SolveTask& task) {
    report(task, "reading its Hessian");
    StoredHessian stored = given_->read(task.block, task.stage);
    ReducedHessian hessian{
        HessianAccumulator(backend_, job().graph.stages_of(task.block)[task.stage].group.columns(), 1),
        std::move(stored.exponents)};
    backend_.copy_from_host(stored.sum.data(), hessian.accumulator.sum());
    return hessian;
}

void LayerRun::take_slowest(std::vector<HeldBlock>& held) {
    std::vector<std::int64_t> micro;
    for_each_hessian(held, [&](HeldBlock& block, std::size_t stage) {
        micro.push_back(std::llround(block.seconds[stage].forward * 1e6));
        micro.push_back(std::llround(block.seconds[stage].hessian * 1e6));
    });
    micro = links_.group().control.all_max(micro);
    auto next = micro.begin();
    for_each_hessian(held, [&](HeldBlock& block, std::size_t stage) {
        block.seconds[stage].forward = static_cast<double>(*next++) * 1e-6;
        block.seconds[stage].hessian = static_cast<double>(*next++) * 1e-6;
    });
}

void LayerRun::solve(std::size_t sweep, std::vector<HeldBlock>& held, const SweepSolves& solves) {
    const auto place = static_cast<std::size_t>(links_.group().control.rank());
    const int team_index = solves.plan.team_of[place];
    const std::unique_ptr<Control> control = links_.group().control.split(team_index);
    const std::unique_ptr<Communicator> communicator =
        make_team_communicator(job().spec.compute.communicator, *control, backend_);
    const Team team{*control, *communicator};
    const std::vector<std::size_t>& tasks = solves.plan.tasks[static_cast<std::size_t>(team_index)];
    for (std::size_t i = 0; i < tasks.size(); ++i) {
        const SolveTask& task = solves.tasks[tasks[i]];
        const double part =
            kStreamShare + (1.0 - kStreamShare) * static_cast<double>(i) / static_cast<double>(tasks.size());
        solved_ = (static_cast<double>(sweep) + part) / static_cast<double>(plan_.sweeps.size());
        solve_task(task, team, held[static_cast<std::size_t>(task.block - held.front().block)]);
    }
}

void LayerRun::report(const SolveTask& task, const char* doing) {
    coordinator_.report(fmt::format("block {} {}: {}", task.block,
                                    job().graph.stages_of(task.block)[task.stage].group.name, doing),
                        solved_);
}

void LayerRun::solve_task(const SolveTask& task, const Team& team, HeldBlock& held) {
    const std::int64_t columns = job().graph.stages_of(task.block)[task.stage].group.columns();
    if (team.control.rank() != 0) {
        Tensor factor = backend_.empty({columns, columns}, DType::f32, "factor");
        solve_outputs(task, team, held, nullptr, factor);
    } else if (given_) {
        ReducedHessian hessian = read_hessian(task);
        solve_outputs(task, team, held, &hessian, hessian.accumulator.workspace());
    } else {
        ReducedHessian& hessian = held.hessians[task.stage];
        solve_outputs(task, team, held, &hessian, hessian.accumulator.workspace());
        hessian.accumulator.release();
    }
}

// `hessian`: on the rank that leads the team, else nothing; `factor`: room for its factor.
void LayerRun::solve_outputs(const SolveTask& task, const Team& team, HeldBlock& held,
                             ReducedHessian* hessian, TensorView factor) {
    const LinearGroup& group = job().graph.stages_of(task.block)[task.stage].group;
    const std::vector<LinearWeights>& weights = held.weights.stages[task.stage];
    FactorOutcome outcome;
    std::optional<GptqOptions> factored;  // how the factor at hand was made
    for (std::size_t o = 0; o < outputs_.size(); ++o) {
        const std::optional<GptqOptions>& options = outputs_[o].scheme.options_at(task.block, task.stage);
        if (!options) continue;
        StageSeconds seconds = held.seconds[task.stage];
        Stopwatch watch;
        if (!factored || !same_factor(*factored, *options)) {
            report(task, "factoring its Hessian");
            if (hessian != nullptr) outcome = solvers_[o].factor(task.block, task.stage, *hessian);
            outcome = GroupSolver::share(team, 0, outcome, factor);
            seconds.factor = watch.restart();
            factored = options;
            if (!job().measures) delivery_->poll();
        }
        report(task, "solving rows");
        const Tensor damped = solvers_[o].share_damped(team, 0, task.block, task.stage, outcome, hessian);
        QuantizedGroup result =
            solvers_[o].solve(team, task.block, task.stage, weights, factor, outcome, {}, damped);
        seconds.solve = watch.seconds();
        if (hessian == nullptr) continue;
        result.seconds = seconds;
        const double io = task.stage == 0 ? load_seconds_.at(task.block) : 0.0;
        auto linears = report_group(outputs_[o], task.block, task.stage, result, io);
        if (probe_) {
            const double error = block_error(task, held, result.quantized);
            for (LinearReport& linear : linears) linear.block_error = error;
        }
        reports_[o].insert(reports_[o].end(), linears.begin(), linears.end());
        if (job().measures) continue;
        written_[o]->write_group(task.block, group, result.quantized, weights,
                                 delivery_->deliver(o, tensors_of(job().graph, task)));
    }
}

// On the rank that leads a team.
double LayerRun::block_error(const SolveTask& task, HeldBlock& held, const QuantizedLinear& quantized) {
    report(task, "measuring its block's outputs");
    if (held.probe_output.empty()) held.probe_output = probe_->output(held.weights, held.probe_input);
    return probe_->error(held.weights, task.stage, quantized, held.probe_input, held.probe_output);
}

void LayerRun::finish(const std::vector<Report>& reports) {
    for (std::size_t o = 0; o < outputs_.size(); ++o) written_[o]->finish(reports[o]);
}

void LayerRun::describe(LayersReport& report) {
    const auto micro = [](double s) { return std::llround(s * 1e6); };
    const double waited = stream_ != nullptr ? stream_->seconds_waited() : 0.0;
    const auto slowest =
        control_.all_max({micro(stream_seconds_), micro(solve_seconds_), micro(waited), micro(run_seconds_),
                          micro(load_seconds_all_), micro(write_seconds_)});
    report.stream_seconds = static_cast<double>(slowest[0]) * 1e-6;
    report.solve_seconds = static_cast<double>(slowest[1]) * 1e-6;
    report.waited_seconds = static_cast<double>(slowest[2]) * 1e-6;
    report.run_seconds = static_cast<double>(slowest[3]) * 1e-6;
    report.load_seconds = static_cast<double>(slowest[4]) * 1e-6;
    report.write_seconds = static_cast<double>(slowest[5]) * 1e-6;
    report.sweeps = static_cast<std::int64_t>(plan_.sweeps.size());
    report.delivery_bytes =
        static_cast<std::uint64_t>(control_.all_sum({static_cast<double>(delivery_->bytes_sent())}).front());
}

}  // namespace quantmill
