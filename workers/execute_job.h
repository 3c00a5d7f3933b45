#pragma once

#include <vector>

#include "jobs/report.h"
#include "pipeline/stopwatch.h"
#include "workers/calibration_batches.h"
#include "workers/coordinator.h"
#include "workers/layer_plan.h"
#include "workers/prepared_job.h"

namespace quantmill {

// Since when a job runs, how long the plan says that it will, and what it says of this rank.
struct RunContext {
    Stopwatch watch;
    double expected_seconds = 0.0;
    ActivationPlacement activations;
};

// Quantizes a job into its output directories, which are ready, and completes `reports`, one a checkpoint.
// `layers`: as layers_of() plans them. Collective.
void execute_job(const std::vector<PreparedJob>& jobs, const LayerPlan& layers, Control& control,
                 Backend& backend, Coordinator& coordinator, const RunContext& context,
                 std::vector<Report>& reports);

}  // namespace quantmill
