#include "workers/run_job.h"

#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include "jobs/text.h"
#include "kernels/make_backend.h"
#include "pipeline/output_directory.h"
#include "workers/bit_choice.h"
#include "workers/checkpoint_output.h"
#include "workers/execute_job.h"
#include "workers/job_report.h"
#include "workers/layer_planner.h"
#include "workers/layer_run.h"
#include "workers/planner.h"
#include "workers/prepared_job.h"

namespace quantmill {
namespace {

void refuse_problems(const Plan& plan) {
    for (const std::string& warning : plan.warnings) spdlog::warn("{}", warning);
    if (plan.problems.empty()) return;
    throw BadInput("the job cannot run:\n  {}", fmt::join(plan.problems, "\n  "));
}

using OutputLocks = std::vector<std::unique_ptr<OutputLock>>;

// Rank 0 prepares the directories before any rank writes to them, and holds them. What is only copied comes
// first: what is wrong with it shows now.
OutputLocks claim_output_directories(const std::vector<PreparedJob>& jobs, bool overwrite, Control& control) {
    OutputLocks locks;
    if (control.rank() == 0) {
        for (const PreparedJob& job : jobs) {
            const JobSpec& spec = job.spec;
            locks.push_back(prepare_output_directory(spec.output.directory, overwrite, spec.model,
                                                     CheckpointOutput::file_names(job)));
            copy_companion_files(spec.model, spec.output.directory);
        }
    }
    control.barrier();
    return locks;
}

void add_output(const PreparedJob& job, const Plan& more, Plan& plan) {
    // Several checkpoints have the same shortages of memory.
    const auto add = [](const std::vector<std::string>& found, std::vector<std::string>& all) {
        for (const std::string& text : found) {
            if (std::ranges::find(all, text) == all.end()) all.push_back(text);
        }
    };
    add(more.problems, plan.problems);
    add(more.warnings, plan.warnings);
    plan.more_outputs.push_back(fmt::format(
        "{} ({}): {}; {} in {} file{}", more.output_directory, more.output_format, more.quantization.scheme,
        bytes_text(job.layout.total_bytes()), more.files.size(), more.files.size() == 1 ? "" : "s"));
    plan.disk_needed += more.disk_needed;
    plan.disk_reclaimed += more.disk_reclaimed;
    plan.disk_free += more.disk_reclaimed;
}

// Stores of Hessians: what the job has to do with them, and what they have against it.
void add_hessian_stores(const PreparedJob& job, Control& control, Plan& plan) {
    const CalibrationSpec& spec = job.spec.calibration;
    const std::string obstacle = hessian_store_obstacle(job, control);
    if (!obstacle.empty()) plan.problems.push_back(obstacle);
    if (!spec.hessians.empty()) {
        plan.calibration.hessians =
            fmt::format("Hessians come from {}: the model is {}", spec.hessians.string(),
                        job.spec.quantization.target_bits ? "run for target_bits only" : "not run");
    }
    if (spec.save_hessians.empty()) return;
    const std::uint64_t needed = HessianStore(spec.save_hessians, job.graph, {}, job.head).bytes();
    const std::uint64_t free = free_disk(spec.save_hessians);
    plan.calibration.hessians =
        fmt::format("Hessians are kept in {}: {} of disk, {} free there", spec.save_hessians.string(),
                    bytes_text(needed), bytes_text(free));
    if (needed <= free) return;
    plan.problems.push_back(fmt::format("calibration.save_hessians {}: they need {} of disk, {} are free",
                                        spec.save_hessians.string(), bytes_text(needed), bytes_text(free)));
}

// The plan of a job and of all its checkpoints.
Plan plan_of(const std::vector<PreparedJob>& jobs, Control& control, Backend& backend,
             const std::string& communicator, bool measure, bool overwrite, const World& world) {
    Plan plan = make_plan(jobs.front(), control, backend, communicator, measure, overwrite, world, jobs);
    for (std::size_t o = 1; o < jobs.size(); ++o) {
        const Plan more = make_plan(jobs[o], control, backend, communicator, false, overwrite, world, jobs);
        add_output(jobs[o], more, plan);
    }
    add_hessian_stores(jobs.front(), control, plan);
    if (jobs.size() > 1 && plan.disk_needed > plan.disk_free) {
        // Not a refusal: the directories may lie on different disks.
        plan.warnings.push_back(
            fmt::format("the {} outputs need {} of disk together, {} are free where {} lies", jobs.size(),
                        bytes_text(plan.disk_needed), bytes_text(plan.disk_free), plan.output_directory));
    }
    return plan;
}

struct OpenedJob {
    std::unique_ptr<Backend> backend;
    std::vector<PreparedJob> outputs;  // one a checkpoint
};

OpenedJob open_job(const std::filesystem::path& file, const std::vector<std::string>& overrides,
                   Control& control) {
    const JobSpec spec = rank_zero_first(control, [&] { return load_job_spec(file, overrides); });
    auto backend = make_backend(spec.compute.backend, control.local_rank(), control.local_size(),
                                spec.compute.device_memory);
    auto outputs =
        rank_zero_first(control, [&] { return prepare_jobs(spec, backend->micro_batch_tokens()); });
    return {std::move(backend), std::move(outputs)};
}

}  // namespace

void plan_job(const PlanCommand& command, Control& control) {
    const auto [backend, jobs] = open_job(command.job, command.overrides, control);
    const ComputeSpec& compute = jobs.front().spec.compute;
    const std::string communicator = choose_communicator(compute.communicator, control, *backend);
    World world = gather_world(control, *backend);
    if (command.world_size) {
        world = imagine_world(*command.world_size, command.gpus_per_node.value_or(*command.world_size), world,
                              backend->host_memory());
    }
    Plan plan = plan_of(jobs, control, *backend, communicator, command.measure, command.overwrite, world);
    plan.job = command.job.string();
    if (control.rank() == 0) fmt::print("{}", to_text(plan));
    if (!plan.problems.empty()) throw BadInput("`run` would refuse this job: see the problems above");
}

void run_job(const RunCommand& command, Control& control) {
    const Stopwatch watch;
    auto [backend, jobs] = open_job(command.job, command.overrides, control);
    const PreparedJob& job = jobs.front();
    const ComputeSpec& compute = job.spec.compute;
    const bool original = job.spec.quantization.propagate == "original";
    const std::string communicator = choose_communicator(compute.communicator, control, *backend);
    const World world = gather_world(control, *backend);
    const Plan plan = plan_of(jobs, control, *backend, communicator, true, command.overwrite, world);
    const double expected_seconds = plan.time ? plan.time->total() : 0.0;
    if (control.rank() == 0) refuse_problems(plan);
    control.barrier();
    require_hessian_stores(job, control);
    std::vector<std::optional<BitBudgetReport>> budgets;
    choose_bits(jobs, world, control, *backend, budgets);
    const OutputLocks locks = claim_output_directories(jobs, command.overwrite, control);
    spdlog::info("{}: {} blocks, {} sequences, {} on {} rank(s), {}; about {}", job.graph.architecture,
                 job.graph.blocks, job.calibration.sequences.size(), plan.quantization.scheme, control.size(),
                 backend->description(), seconds_text(expected_seconds));

    std::vector<Report> reports;
    for (std::size_t o = 0; o < jobs.size(); ++o) {
        reports.push_back(begin_report(jobs[o], control, *backend, communicator));
        reports.back().bit_budget = budgets[o];
        reports.back().warnings = plan.warnings;
        reports.back().layers.bubble = plan.layers.bubble;
        if (plan.time) {
            const PlannedTime& time = *plan.time;
            reports.back().planned = {time.forward, time.hessian, time.factor, time.solve, time.io};
        }
    }
    const PlannedRank& mine = plan.ranks.at(static_cast<std::size_t>(control.rank()));
    Coordinator coordinator(control, compute.stall_timeout, original);
    execute_job(jobs, layers_of(jobs, world, *backend), control, *backend, coordinator,
                {watch, expected_seconds, activations_of(job.spec, mine)}, reports);
    coordinator.finish();
    for (std::size_t o = 0; o < jobs.size() && control.rank() == 0; ++o) {
        fmt::print("{}\ncheckpoint: {}\n", summary_table(reports[o]), jobs[o].spec.output.directory.string());
    }
}

}  // namespace quantmill
