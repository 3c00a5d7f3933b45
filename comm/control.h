#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/error.h"

namespace quantmill {

// The ranks of a job and their small host messages. Collective calls must be made by all ranks in
// the same order, from one thread. Every wait polls a deadline (QUANTMILL_TIMEOUT seconds, 6 hours
// by default); a rank that waits longer throws InfrastructureError with its host, rank and what it
// waited for.
class Control {
public:
    Control() = default;
    virtual ~Control() = default;
    Control(const Control&) = delete;
    Control& operator=(const Control&) = delete;

    virtual int rank() const = 0;
    virtual int size() const = 0;
    virtual int local_rank() const = 0;  // rank among the ranks of this host
    virtual int local_size() const = 0;  // ranks of this host
    virtual const std::string& host() const = 0;

    virtual void barrier() = 0;
    // Returns root's message on every rank.
    virtual std::string broadcast(const std::string& message, int root) = 0;
    // Returns every rank's message, in rank order, on every rank.
    virtual std::vector<std::string> all_gather(const std::string& message) = 0;
    // Element-wise over ranks. Sums of doubles are taken in rank order.
    virtual std::vector<double> all_sum(const std::vector<double>& values) = 0;
    virtual std::vector<std::int64_t> all_max(const std::vector<std::int64_t>& values) = 0;
    // Moves whole host buffers; used by the Communicator on host memory and nothing else.
    virtual void broadcast_bytes(void* data, std::size_t bytes, int root) = 0;
    virtual void all_sum_int64(std::int64_t* data, std::size_t count) = 0;

    // Ends every rank of the job with this exit code. Does not return.
    [[noreturn]] virtual void abort(ExitCode code) = 0;
};

// True when the environment says that mpirun or srun started this process, with peers.
bool under_launcher();

// A Control over MPI when `use_mpi`, else of a lone process; `use_mpi` initialises MPI, and the last
// Control to go finalises it, unless an exception is passing: then abort() must end the job.
// Throws BadInput when the launcher started several processes that do not see each other
// (OMPI_COMM_WORLD_SIZE, PMI_SIZE or SLURM_STEP_NUM_TASKS above the world size), naming the --mpi
// remedy. `whole_allocation`: this process should be one rank for each task of a Slurm allocation, so
// SLURM_NTASKS counts too; false for what runs alone in a batch script (plan, inspect).
std::unique_ptr<Control> make_control(bool use_mpi, bool whole_allocation = true);

// "Open MPI v4.1.4": the MPI library in use.
std::string mpi_library();

}  // namespace quantmill
