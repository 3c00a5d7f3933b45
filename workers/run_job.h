#pragma once

#include "comm/control.h"
#include "workers/cli.h"

namespace quantmill {

// `quantmill run`: the whole road from a checkpoint to a quantized checkpoint. Collective.
void run_job(const RunCommand& command, Control& control);

// `quantmill plan`: prints what `run` would do. Throws BadInput when it would refuse. Collective.
void plan_job(const PlanCommand& command, Control& control);

}  // namespace quantmill
