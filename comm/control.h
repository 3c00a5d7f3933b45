#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/transfer.h"
#include "kernels/error.h"

namespace quantmill {

// A short message that was posted to this rank.
struct Mail {
    int from = 0;
    std::string text;
};

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
    virtual void sum_int64_to(std::int64_t* data, std::size_t count, int root) = 0;  // the others keep theirs

    // The ranks that give the same color, in the order of their ranks, as a Control of their own; messages
    // of errors keep naming ranks of the whole job. Collective.
    virtual std::unique_ptr<Control> split(int color) = 0;

    // Host memory to or from one other rank, beside what else the caller does. What one rank sends to
    // another arrives in the order in which it was sent.
    virtual std::unique_ptr<Transfer> start_send_bytes(const void* data, std::size_t bytes, int peer) = 0;
    virtual std::unique_ptr<Transfer> start_receive_bytes(void* data, std::size_t bytes, int peer) = 0;

    // Mail: short messages beside all collective calls, for one thread that need not be the main one. Its
    // calls never block. False when the MPI library lets one thread only call it.
    virtual bool has_mail() const = 0;
    // False, and the text is dropped, while the last one to this peer is still on its way.
    virtual bool post(const std::string& text, int peer) = 0;
    virtual std::optional<Mail> next_mail() = 0;
    // Takes what is still on its way to anyone, so that the library can end. Collective, by the main thread,
    // when no other thread posts any more.
    virtual void drop_mail() = 0;

    // Ends every rank of the job with this exit code. Does not return. From any thread if has_mail().
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

// A Control of this process alone, also among others.
std::unique_ptr<Control> make_lone_control();

// Seconds since this process last polled for a peer: a rank that waits is not stalled.
double seconds_since_poll();
// Says that this process polls for a peer by other means than a Control, which notes it by itself.
void note_poll();

// "Open MPI v4.1.4": the MPI library in use.
std::string mpi_library();

}  // namespace quantmill
