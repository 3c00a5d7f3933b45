#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "comm/control.h"
#include "kernels/backend.h"

namespace quantmill {

// Rows [begin, end) of something that is split over ranks.
struct RowRange {
    std::int64_t begin = 0;
    std::int64_t end = 0;
    std::int64_t count() const { return end - begin; }
    bool empty() const { return begin == end; }
    friend bool operator==(const RowRange&, const RowRange&) = default;
};

// Moves tensors between ranks. Collective: all ranks call in the same order with equal shapes.
// Every result is bit-identical on any number of ranks: sums are over integers only.
class Communicator {
public:
    Communicator() = default;
    virtual ~Communicator() = default;
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    virtual std::string name() const = 0;  // "mpi" or "nccl"
    virtual void broadcast(TensorView tensor, int root) = 0;
    virtual void all_sum(TensorView sum) = 0;  // i64, exact
    // Afterwards every rank holds all rows; rank r brought rows ranges[r], which are disjoint.
    virtual void all_gather_rows(TensorView tensor, std::span<const RowRange> ranges) = 0;
    virtual void sum_to(TensorView sum, int root) = 0;  // i64, exact; the others' tensors are left undefined

    // Not collective: one rank sends, `peer` receives as many bytes, in the order of the sends. The tensor
    // must live and stay as it is until the transfer is waited for; what is received is there for the
    // backend's next operation afterwards.
    virtual std::unique_ptr<Transfer> start_send(ConstTensorView tensor, int peer) = 0;
    virtual std::unique_ptr<Transfer> start_receive(TensorView tensor, int peer) = 0;
    // Whether a receive that waits for its send takes processors of the device from the computation (a kernel
    // of NCCL's polls for it): then start it when the peer is about to send, not long before.
    virtual bool receives_occupy_device() const = 0;

    // To whom this rank will send and from whom it will receive: connects them, and all ranks for collective
    // calls, where the first message would otherwise wait for that. Collective.
    virtual void connect(std::span<const int> receivers, std::span<const int> senders) = 0;
};

// "nccl" or "mpi": what make_communicator would make. Collective.
std::string choose_communicator(const std::string& kind, Control& control, Backend& backend);

// kind: "auto" (nccl for several ranks that each have a GPU of their own, else mpi), "nccl" or "mpi" (CUDA
// tensors are then staged through the host). Collective. `control` and `backend` must outlive the
// communicator.
std::unique_ptr<Communicator> make_communicator(const std::string& kind, Control& control, Backend& backend);

}  // namespace quantmill
