#pragma once

#include "comm/communicator.h"
#include "jobs/plan.h"
#include "workers/prepared_job.h"

namespace quantmill {

// What of a device's free memory tensors can fill: allocations of many sizes leave gaps in a pool.
std::size_t usable_device_memory(std::size_t free);

// Works out who does what, what it takes and what speaks against it. Collective. `measure` times a matrix
// product on every rank for half a second to predict the run time. `overwrite`: the run may replace a result.
Plan make_plan(const PreparedJob& job, Control& control, Backend& backend, const std::string& communicator,
               bool measure, bool overwrite = false);

}  // namespace quantmill
