#include "comm/counting_communicator.h"

#include <utility>

namespace quantmill {
namespace {

class CountingCommunicator final : public Communicator {
public:
    CountingCommunicator(std::unique_ptr<Communicator> inner, const Control& control)
        : inner_(std::move(inner)), rank_(control.rank()), size_(control.size()) {}

    std::string name() const override { return inner_->name(); }
    void broadcast(TensorView tensor, int root) override {
        if (rank_ != root) process_traffic().broadcast += tensor.size_bytes();
        inner_->broadcast(tensor, root);
    }
    void all_sum(TensorView sum) override {
        if (size_ > 1) process_traffic().sum += sum.size_bytes();
        inner_->all_sum(sum);
    }
    void all_gather_rows(TensorView tensor, std::span<const RowRange> ranges) override {
        for (int rank = 0; rank < size_; ++rank) {
            const RowRange& range = ranges[static_cast<std::size_t>(rank)];
            if (rank != rank_) process_traffic().gather += tensor.rows(range.begin, range.end).size_bytes();
        }
        inner_->all_gather_rows(tensor, ranges);
    }
    void sum_to(TensorView sum, int root) override {
        if (rank_ != root) process_traffic().sum += sum.size_bytes();
        inner_->sum_to(sum, root);
    }
    std::unique_ptr<Transfer> start_send(ConstTensorView tensor, int peer) override {
        return inner_->start_send(tensor, peer);
    }
    void connect(std::span<const int> receivers, std::span<const int> senders) override {
        inner_->connect(receivers, senders);
    }
    std::unique_ptr<Transfer> start_receive(TensorView tensor, int peer) override {
        process_traffic().stream += tensor.size_bytes();
        return inner_->start_receive(tensor, peer);
    }
    bool receives_occupy_device() const override { return inner_->receives_occupy_device(); }

private:
    std::unique_ptr<Communicator> inner_;
    int rank_, size_;
};

}  // namespace

Traffic& process_traffic() {
    static Traffic traffic;
    return traffic;
}

std::unique_ptr<Communicator> count_traffic(std::unique_ptr<Communicator> inner, const Control& control) {
    return std::make_unique<CountingCommunicator>(std::move(inner), control);
}

}  // namespace quantmill
