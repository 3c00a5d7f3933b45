#pragma once

#include <string>
#include <vector>

#include "jobs/report.h"
#include "workers/group_solver.h"
#include "workers/prepared_job.h"

namespace quantmill {

// What is known of a job before it runs. Collective.
Report begin_report(const PreparedJob& job, Control& control, const Backend& backend,
                    const std::string& communicator);

// The linears of a group after their solve; logs what went otherwise than planned.
std::vector<LinearReport> report_group(const PreparedJob& job, int block, std::size_t stage,
                                       const QuantizedGroup& result, double io_seconds);

// Brings the linears that different ranks solved to all ranks, in the order of the model. Collective.
std::vector<LinearReport> gather_linears(const PreparedJob& job, Control& control,
                                         const std::vector<LinearReport>& own);

}  // namespace quantmill
