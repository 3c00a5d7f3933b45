#pragma once

#include <optional>
#include <string>

namespace quantmill {

std::string host_name();

// Seconds that a rank waits for its peers: QUANTMILL_TIMEOUT, 6 hours by default. Throws BadInput when
// that is not a positive number.
double wait_timeout();

// How many processes the launcher says it started, and the variable that says so.
struct LaunchedProcesses {
    int count = 1;
    std::string variable;
};
std::optional<LaunchedProcesses> launched_processes(bool whole_allocation);

// The rank that the launcher says this process will be, before MPI says so; 0 of a lone process.
int launched_rank();

// Whether srun started this process and others without that by which MPI libraries find each other (PMI,
// PMIx).
bool srun_without_process_interface();

// Throws BadInput with the remedy when the launcher started more processes than the world holds.
void require_launched_processes_in_world(int world_size, bool whole_allocation);

}  // namespace quantmill
