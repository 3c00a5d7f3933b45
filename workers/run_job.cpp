#include "workers/run_job.h"

#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include "jobs/text.h"
#include "kernels/make_backend.h"
#include "pipeline/model_card.h"
#include "pipeline/output_directory.h"
#include "pipeline/stopwatch.h"
#include "workers/checkpoint_output.h"
#include "workers/planner.h"
#include "workers/prepared_job.h"
#include "workers/progress.h"
#include "workers/version.h"
#include "workers/worker.h"

namespace quantmill {
namespace {

void refuse_problems(const Plan& plan) {
    for (const std::string& warning : plan.warnings) spdlog::warn("{}", warning);
    if (plan.problems.empty()) return;
    throw BadInput("the job cannot run:\n  {}", fmt::join(plan.problems, "\n  "));
}

Worker::Options options_of(const QuantizationSpec& spec, std::int64_t device_tokens) {
    return {
        {{spec.bits, spec.group_size, spec.sym}, spec.desc_act, spec.damp_percent, spec.damp_auto_increment},
        spec.true_sequential,
        device_tokens};
}

// Rank 0 prepares the directory before any rank writes to it, and holds it. What is only copied comes first:
// what is wrong with it shows now.
std::unique_ptr<OutputLock> claim_output_directory(const PreparedJob& job, bool overwrite, Control& control) {
    const JobSpec& spec = job.spec;
    std::unique_ptr<OutputLock> lock;
    if (control.rank() == 0) {
        lock = prepare_output_directory(spec.output.directory, overwrite, spec.model,
                                        CheckpointOutput::file_names(job));
        copy_companion_files(spec.model, spec.output.directory);
    }
    control.barrier();
    return lock;
}

std::string fallback_of(const FactorOutcome& outcome) {
    if (outcome.round_to_nearest) return fallback_rounding;
    return outcome.damping_raised ? fallback_damping : "";
}

void report_group(const PreparedJob& job, int block, const LinearGroup& group, const QuantizedGroup& result,
                  double io_seconds, Report& report) {
    for (std::size_t l = 0; l < group.linears.size(); ++l) {
        const Linear& linear = group.linears[l];
        LinearReport entry;
        entry.module = job.graph.in_block(block, linear.name);
        entry.block = block;
        entry.group = group.name;
        entry.rows = linear.rows;
        entry.columns = linear.columns;
        entry.bits = result.quantized.grid.bits;
        entry.group_size = result.quantized.grid.group_size;
        entry.loss = result.loss[l];
        entry.mean_squared_error =
            result.squared_error[l] / static_cast<double>(linear.rows * linear.columns);
        entry.tokens = report.tokens;
        entry.damp_percent = result.outcome.damp_percent;
        entry.dead_columns = static_cast<std::int64_t>(result.outcome.dead_columns.size());
        entry.fallback = fallback_of(result.outcome);
        entry.forward_seconds = result.seconds.forward;
        entry.hessian_seconds = result.seconds.hessian;
        entry.factor_seconds = result.seconds.factor;
        entry.solve_seconds = result.seconds.solve;
        entry.io_seconds = io_seconds;
        report.linears.push_back(entry);
    }
    if (!result.outcome.dead_columns.empty() || !fallback_of(result.outcome).empty()) {
        spdlog::info("block {} {}: damping {:.3f}, {} dead columns {}", block, group.name,
                     result.outcome.damp_percent, result.outcome.dead_columns.size(),
                     fallback_of(result.outcome));
    }
}

Report begin_report(const PreparedJob& job, Control& control, const Backend& backend,
                    const Communicator& communicator) {
    Report report;
    report.version = short_version();
    report.backend = backend.name();
    report.communicator = communicator.name();
    report.model = base_model_name(job.spec.model);
    report.family = job.graph.family;
    report.job_yaml = to_yaml(job.spec);
    report.libraries = library_versions();
    report.devices = control.all_gather(control.host() + ": " + backend.description());
    report.world_size = control.size();
    report.threads = backend.threads();
    report.sequences = static_cast<std::int64_t>(job.calibration.sequences.size());
    for (const BatchShard& shard : job.shards) report.tokens += shard.tokens();
    for (const auto& [name, tensor] : job.reader.tensors()) report.parameters += tensor.count();
    report.source_bytes = job.reader.total_bytes();
    report.output_bytes = job.layout.total_bytes();
    return report;
}

struct OpenedJob {
    std::unique_ptr<Backend> backend;
    PreparedJob job;
};

OpenedJob open_job(const std::filesystem::path& file, const std::vector<std::string>& overrides,
                   Control& control) {
    const JobSpec spec = rank_zero_first(control, [&] { return load_job_spec(file, overrides); });
    auto backend = make_backend(spec.compute.backend, control.local_rank(), control.local_size(),
                                spec.compute.device_memory);
    PreparedJob job =
        rank_zero_first(control, [&] { return prepare_job(spec, backend->micro_batch_tokens()); });
    return {std::move(backend), std::move(job)};
}

// The run loop: block after block, each read ahead, quantized and written.
void quantize_blocks(const PreparedJob& job, std::int64_t device_tokens, Control& control, Backend& backend,
                     Communicator& communicator, CheckpointOutput& output, Progress& progress,
                     Report& report) {
    WeightLoader loader(backend, control, communicator, job.reader, job.graph);
    Worker worker(backend, control, communicator, job.graph, options_of(job.spec.quantization, device_tokens),
                  job.shards);
    loader.prefetch_block(0);
    worker.embed(job.calibration.sequences,
                 loader.load(job.graph.embedding, {job.graph.vocab_size, job.graph.hidden_size}));

    Stopwatch watch;
    for (int block = 0; block < job.graph.blocks; ++block) {
        Stopwatch io;
        BlockWeights weights = loader.load_block(block);
        double io_seconds = io.seconds();
        loader.prefetch_block(block + 1);
        worker.quantize_block(block, weights, [&](std::size_t stage, const QuantizedGroup& result) {
            const LinearGroup& group = job.graph.stages[stage].group;
            io.restart();
            output.write_group(block, group, result.quantized, weights.stages[stage]);
            io_seconds += io.seconds();
            report_group(job, block, group, result, std::exchange(io_seconds, 0.0), report);
            progress.stage_done(block, stage, group.name);
        });
        double loss = 0.0;
        for (const LinearReport& linear : report.linears) loss += linear.block == block ? linear.loss : 0.0;
        progress.block_done(block, fmt::format("loss {:.4g}", loss));
        report.block_seconds.push_back(watch.restart());
    }
}

}  // namespace

void plan_job(const PlanCommand& command, Control& control) {
    const auto [backend, job] = open_job(command.job, command.overrides, control);
    const auto communicator = make_communicator(job.spec.compute.communicator, control, *backend);
    Plan plan = make_plan(job, control, *backend, communicator->name(), command.measure, command.overwrite);
    plan.job = command.job.string();
    if (control.rank() == 0) fmt::print("{}", to_text(plan));
    if (!plan.problems.empty()) throw BadInput("`run` would refuse this job: see the problems above");
}

void run_job(const RunCommand& command, Control& control) {
    const Stopwatch watch;
    const auto [backend, job] = open_job(command.job, command.overrides, control);
    const auto communicator = make_communicator(job.spec.compute.communicator, control, *backend);
    const Plan plan = make_plan(job, control, *backend, communicator->name(), true, command.overwrite);
    const PlannedRank& mine = plan.ranks.at(static_cast<std::size_t>(control.rank()));
    const double expected_seconds = plan.time ? plan.time->total() : 0.0;
    if (control.rank() == 0) refuse_problems(plan);
    control.barrier();
    const auto lock = claim_output_directory(job, command.overwrite, control);
    spdlog::info("{}: {} blocks, {} sequences, {} on {} rank(s), {}; about {}", job.graph.architecture,
                 job.graph.blocks, job.calibration.sequences.size(), plan.quantization.scheme, control.size(),
                 backend->description(), seconds_text(expected_seconds));

    Report report = begin_report(job, control, *backend, *communicator);
    report.warnings = plan.warnings;
    CheckpointOutput output(job, control, *backend);
    output.copy_untouched();
    {
        Progress progress(control.rank() == 0, job.graph.blocks, job.graph.stages.size(), expected_seconds);
        quantize_blocks(job, mine.device_tokens, control, *backend, *communicator, output, progress, report);
    }
    report.seconds = watch.seconds();
    report.peak_memory = static_cast<std::uint64_t>(
        control.all_max({static_cast<std::int64_t>(backend->peak_memory())}).front());
    output.finish(report);
    if (control.rank() == 0) {
        fmt::print("{}\ncheckpoint: {}\n", summary_table(report), job.spec.output.directory.string());
    }
}

}  // namespace quantmill
