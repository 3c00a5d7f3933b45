#pragma once

#include <optional>
#include <span>

#include "comm/communicator.h"
#include "jobs/plan.h"
#include "workers/calibration_batches.h"
#include "workers/layer_planner.h"
#include "workers/prepared_job.h"

namespace quantmill {

// Where a run keeps the activations of a rank that was planned so.
ActivationPlacement activations_of(const JobSpec& spec, const PlannedRank& rank);

// Works out who does what, what it takes and what speaks against it. Collective. `measure` times a matrix
// product on every rank for half a second to predict the run time. `overwrite`: the run may replace a result.
// `imagined`: ranks to plan for instead of those that are there. `outputs`: all checkpoints of the run, when
// `job` is one of several.
Plan make_plan(const PreparedJob& job, Control& control, Backend& backend, const std::string& communicator,
               bool measure, bool overwrite = false, const std::optional<World>& imagined = std::nullopt,
               std::span<const PreparedJob> outputs = {});

}  // namespace quantmill
