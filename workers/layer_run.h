#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/hessian_store.h"
#include "workers/block_probe.h"
#include "workers/hessian_stream.h"
#include "workers/job_report.h"
#include "workers/layer_solves.h"
#include "workers/tensor_delivery.h"

namespace quantmill {

// What the Hessians of a job are made of. Collective.
HessianOrigin hessian_origin(const PreparedJob& job, Control& control);
// What the stores of Hessians that a job names have against it, nothing when they suit. Writes nothing.
// Collective.
std::string hessian_store_obstacle(const PreparedJob& job, Control& control);
// Refuses stores of Hessians that do not belong to the job, and makes the one that it fills. Collective.
void require_hessian_stores(const PreparedJob& job, Control& control);

// Quantizes a model with the Hessians of its unquantized blocks: groups of ranks hold ranges of blocks, the
// hidden states stream through them, then each group solves its own. Writes one or many checkpoints, which
// differ in their quantization; `outputs` has a job for each and the same model and calibration in all.
class LayerRun {
public:
    // Collective, as is run().
    LayerRun(const std::vector<PreparedJob>& outputs, const LayerPlan& plan, Control& control,
             Backend& backend, Coordinator& coordinator);

    // Quantizes all blocks and hands every tensor to the rank that writes it, or measures what that does to
    // the outputs of blocks (PreparedJob::measures). Returns the linears of each output, on all ranks. Only
    // of a run that writes: finish() and describe().
    std::vector<std::vector<LinearReport>> run();
    // Closes the checkpoints; a report for each. Collective.
    void finish(const std::vector<Report>& reports);
    // Adds what this run took. Collective.
    void describe(LayersReport& report);

private:
    const PreparedJob& job() const { return outputs_.front(); }
    void open_outputs();
    void expect_deliveries();

    void run_sweep(std::size_t sweep);
    void prefetch(std::size_t sweep);
    void read_ahead(std::size_t sweep);
    std::vector<HeldBlock> load_blocks(BlockRange range);
    void reduce(std::vector<HeldBlock>& held, const SweepSolves& solves);
    void save(std::vector<HeldBlock>& held);
    void hand_over(std::vector<HeldBlock>& held, const SweepSolves& solves);
    ReducedHessian read_hessian(const SolveTask& task);
    void take_slowest(std::vector<HeldBlock>& held);
    void solve(std::size_t sweep, std::vector<HeldBlock>& held, const SweepSolves& solves);
    void solve_task(const SolveTask& task, const Team& team, HeldBlock& held);
    void solve_outputs(const SolveTask& task, const Team& team, HeldBlock& held, ReducedHessian* hessian,
                       TensorView factor);
    double block_error(const SolveTask& task, HeldBlock& held, const QuantizedLinear& quantized);
    void report(const SolveTask& task, const char* doing);

    const std::vector<PreparedJob>& outputs_;
    const LayerPlan& plan_;
    Control& control_;
    Backend& backend_;
    Coordinator& coordinator_;
    std::size_t group_;
    LayerLinks links_;
    WeightLoader loader_;
    std::unique_ptr<HessianStream> stream_;
    std::unique_ptr<HessianStore> given_, saved_;
    std::unique_ptr<BlockProbe> probe_;                       // that measures
    std::vector<GroupSolver> solvers_;                        // [output]
    std::vector<std::unique_ptr<CheckpointOutput>> written_;  // [output]
    std::unique_ptr<TensorDelivery> delivery_;
    std::map<int, double> load_seconds_;              // [block]
    std::vector<std::vector<LinearReport>> reports_;  // [output]: what this rank's team solved
    double load_seconds_all_ = 0.0, stream_seconds_ = 0.0, solve_seconds_ = 0.0, write_seconds_ = 0.0,
           run_seconds_ = 0.0;
    double solved_ = 0.0;  // tasks of this rank, for the progress view
};

}  // namespace quantmill
