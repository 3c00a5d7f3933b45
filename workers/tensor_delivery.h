#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "workers/checkpoint_output.h"

namespace quantmill {

// Who writes which tensor of an output, and how large it is.
class TensorOwners {
public:
    // `writers`: the rank that writes each output shard.
    TensorOwners(const OutputLayout& layout, const std::vector<int>& writers);
    int writer_of(const std::string& tensor) const { return places_.at(tensor).writer; }
    std::size_t bytes_of(const std::string& tensor) const { return places_.at(tensor).bytes; }

private:
    struct Place {
        int writer = 0;
        std::size_t bytes = 0;
    };
    std::map<std::string, Place> places_;
};

// Takes finished tensors from the ranks that solved them to those that write their files, in the background.
// Nothing is announced: every rank knows from the plan what each other one will deliver, and in which order.
class TensorDelivery {
public:
    // `outputs`: this rank's, with the owners of their tensors.
    TensorDelivery(Control& control, std::vector<CheckpointOutput*> outputs,
                   std::vector<TensorOwners> owners);

    // Rank `from` will deliver these tensors; in the order of its deliveries.
    void expect(int from, std::size_t output, const std::vector<std::string>& tensors);
    // This rank makes these tensors: the result takes, from any one thread, those that others write. Each is
    // sent by a later call here, once all that go to the same rank have come.
    EncodedLinear::Sink deliver(std::size_t output, const std::vector<std::string>& tensors);
    // Sends what has come from the sinks, and writes what has arrived from others; never waits for them.
    void poll();
    // Waits until all that was expected is written and all that was sent has left.
    void finish();

    std::uint64_t bytes_sent() const { return bytes_sent_; }

private:
    // Memory that is not filled with zeros first.
    struct Bytes {
        std::unique_ptr<std::byte[]> data;
        std::size_t size = 0;
        void allocate(std::size_t bytes);
    };
    struct Parcel {
        std::size_t output = 0;
        std::vector<std::string> tensors;  // sorted; they lie one behind the other
        std::shared_ptr<Bytes> bytes;
        std::unique_ptr<Transfer> transfer;
    };
    struct Outgoing {
        int to = 0;
        std::map<std::string, std::size_t> offsets;
        Bytes bytes;
        std::atomic<std::size_t> missing{0};  // tensors that have not come yet
        std::unique_ptr<Transfer> transfer;
    };

    void begin_next(int from);
    void write(const Parcel& parcel);
    void send();

    Control& control_;
    std::vector<CheckpointOutput*> outputs_;
    std::vector<TensorOwners> owners_;
    std::map<int, std::deque<Parcel>> expected_;  // by sender; the first is being received
    std::deque<std::shared_ptr<Outgoing>> sent_;  // in the order of deliveries
    std::uint64_t bytes_sent_ = 0;
};

}  // namespace quantmill
