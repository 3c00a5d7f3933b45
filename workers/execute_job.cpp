#include "workers/execute_job.h"

#include <fmt/format.h>

#include <utility>

#include "comm/counting_communicator.h"
#include "workers/checkpoint_output.h"
#include "workers/job_report.h"
#include "workers/layer_run.h"
#include "workers/progress.h"
#include "workers/worker.h"

namespace quantmill {
namespace {

// What all communicators of all ranks have moved. Collective.
LayersReport describe_traffic(Control& control) {
    const Traffic& own = process_traffic();
    const auto all = control.all_sum({static_cast<double>(own.broadcast), static_cast<double>(own.sum),
                                      static_cast<double>(own.gather), static_cast<double>(own.stream)});
    LayersReport report;
    report.broadcast_bytes = static_cast<std::uint64_t>(all[0]);
    report.sum_bytes = static_cast<std::uint64_t>(all[1]);
    report.gather_bytes = static_cast<std::uint64_t>(all[2]);
    report.stream_bytes = static_cast<std::uint64_t>(all[3]);
    return report;
}

// Of the rank that took most. Collective.
std::uint64_t peak_memory(Control& control, const Backend& backend) {
    return static_cast<std::uint64_t>(
        control.all_max({static_cast<std::int64_t>(backend.peak_memory())}).front());
}

// The run loop of propagate: quantized: block after block, each read ahead, quantized and written.
void quantize_blocks(const PreparedJob& job, const LayerPlan& layers, const ActivationPlacement& activations,
                     Control& control, Backend& backend, Communicator& communicator, Coordinator& coordinator,
                     CheckpointOutput& output, Progress& progress, Report& report) {
    WeightLoader loader(backend, control, communicator, job.reader, job.graph);
    const std::unique_ptr<Control> row_control = control.split(layers.group_of(control.rank()));
    const auto row_communicator =
        make_team_communicator(job.spec.compute.communicator, *row_control, backend);
    Worker worker(backend, {control, communicator}, {*row_control, *row_communicator}, coordinator, job.graph,
                  {job.scheme, job.spec.quantization.true_sequential, activations}, job.shards);
    loader.prefetch_block(0);
    worker.embed(job.calibration.sequences,
                 loader.load(job.graph.embedding, {job.graph.vocab_size, job.graph.hidden_size}));

    Stopwatch watch;
    for (int block = 0; block < job.scheme.blocks(); ++block) {
        Stopwatch io;
        BlockWeights weights = loader.load_block(block);
        double io_seconds = io.seconds();
        loader.prefetch_block(block + 1);
        worker.quantize_block(block, weights, [&](std::size_t stage, const QuantizedGroup* result) {
            const LinearGroup& group = job.graph.stages_of(block)[stage].group;
            if (result != nullptr) {
                io.restart();
                output.write_group(block, group, result->quantized, weights.stages[stage]);
                io_seconds += io.seconds();
                const auto linears = report_group(job, block, stage, *result, std::exchange(io_seconds, 0.0));
                report.linears.insert(report.linears.end(), linears.begin(), linears.end());
            }
            progress.stage_done(block, stage, group.name);
        });
        double loss = 0.0;
        for (const LinearReport& linear : report.linears) loss += linear.block == block ? linear.loss : 0.0;
        progress.block_done(block, fmt::format("loss {:.4g}", loss));
        report.block_seconds.push_back(watch.restart());
    }
}

void run_quantized(const PreparedJob& job, const LayerPlan& layers, Control& control, Backend& backend,
                   Coordinator& coordinator, const RunContext& context, Report& report) {
    const auto communicator = make_communicator(job.spec.compute.communicator, control, backend);
    CheckpointOutput output(job, control, backend);
    output.copy_untouched();
    {
        Progress progress(control.rank() == 0, job.scheme.blocks(), job.graph.stages.size(),
                          context.expected_seconds);
        quantize_blocks(job, layers, context.activations, control, backend, *communicator, coordinator,
                        output, progress, report);
    }
    report.layers = describe_traffic(control);
    report.layers.groups = static_cast<std::int64_t>(layers.groups.size());
    report.seconds = context.watch.seconds();
    report.peak_memory = peak_memory(control, backend);
    output.finish(report);
}

void run_original(const std::vector<PreparedJob>& jobs, const LayerPlan& layers, Control& control,
                  Backend& backend, Coordinator& coordinator, const RunContext& context,
                  std::vector<Report>& reports) {
    LayerRun run(jobs, layers, control, backend, coordinator);
    const auto linears = run.run();
    LayersReport shared = describe_traffic(control);
    run.describe(shared);
    shared.propagate = "original";
    shared.groups = static_cast<std::int64_t>(layers.groups.size());
    shared.bubble = reports.front().layers.bubble;
    const std::uint64_t peak = peak_memory(control, backend);
    for (std::size_t o = 0; o < jobs.size(); ++o) {
        reports[o].linears = linears[o];
        reports[o].layers = shared;
        reports[o].peak_memory = peak;
        reports[o].seconds = context.watch.seconds();
    }
    run.finish(reports);
}

}  // namespace

void execute_job(const std::vector<PreparedJob>& jobs, const LayerPlan& layers, Control& control,
                 Backend& backend, Coordinator& coordinator, const RunContext& context,
                 std::vector<Report>& reports) {
    if (jobs.front().spec.quantization.propagate == "original") {
        run_original(jobs, layers, control, backend, coordinator, context, reports);
    } else {
        run_quantized(jobs.front(), layers, control, backend, coordinator, context, reports.front());
    }
}

}  // namespace quantmill
