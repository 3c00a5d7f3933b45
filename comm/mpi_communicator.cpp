#include "comm/mpi_communicator.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "comm/row_ranges.h"

namespace quantmill {

namespace {

class MpiCommunicator final : public Communicator {
public:
    MpiCommunicator(Control& control, Backend& backend, std::size_t staging_bytes)
        : control_(control), backend_(backend), staging_bytes_(staging_bytes) {}

    std::string name() const override { return "mpi"; }
    void broadcast(TensorView tensor, int root) override;
    void all_sum(TensorView sum) override;
    void all_gather_rows(TensorView tensor, std::span<const RowRange> ranges) override;
    void sum_to(TensorView sum, int root) override;
    std::unique_ptr<Transfer> start_send(ConstTensorView tensor, int peer) override;
    void connect(std::span<const int> /*receivers*/, std::span<const int> /*senders*/) override {}
    std::unique_ptr<Transfer> start_receive(TensorView tensor, int peer) override;
    bool receives_occupy_device() const override { return false; }

private:
    template <class Exchange>
    void through_host(TensorView tensor, bool send, bool receive, Exchange exchange);

    Control& control_;
    Backend& backend_;
    std::size_t staging_bytes_;
    std::vector<std::byte> staging_;
};

// Calls exchange(bytes, count) on host memory that holds the tensor, whole or piece by piece.
template <class Exchange>
void MpiCommunicator::through_host(TensorView tensor, bool send, bool receive, Exchange exchange) {
    if (tensor.empty()) return;
    if (backend_.host_memory()) {
        exchange(tensor.bytes(), tensor.size_bytes());
        return;
    }
    // Whole 64-bit words, so that no piece cuts a number.
    const std::size_t piece = staging_bytes_ / sizeof(std::int64_t) * sizeof(std::int64_t);
    const std::size_t bytes = tensor.size_bytes();
    staging_.resize(std::max(staging_.size(), std::min(piece, bytes)));
    for (std::size_t begin = 0; begin < bytes; begin += piece) {
        const std::size_t count = std::min(piece, bytes - begin);
        const TensorView part(tensor.bytes() + begin, DType::u8, {static_cast<std::int64_t>(count)},
                              tensor.backend());
        if (send) backend_.copy_to_host(part, staging_.data());
        exchange(staging_.data(), count);
        if (receive) backend_.copy_from_host(staging_.data(), part);
    }
}

void MpiCommunicator::broadcast(TensorView tensor, int root) {
    if (control_.size() == 1) return;
    const bool is_root = control_.rank() == root;
    through_host(tensor, is_root, !is_root,
                 [&](std::byte* data, std::size_t bytes) { control_.broadcast_bytes(data, bytes, root); });
}

void MpiCommunicator::all_sum(TensorView sum) {
    require_integers(sum);
    if (control_.size() == 1) return;
    through_host(sum, true, true, [&](std::byte* data, std::size_t bytes) {
        control_.all_sum_int64(reinterpret_cast<std::int64_t*>(data), bytes / sizeof(std::int64_t));
    });
}

void MpiCommunicator::sum_to(TensorView sum, int root) {
    require_integers(sum);
    if (control_.size() == 1) return;
    through_host(sum, true, control_.rank() == root, [&](std::byte* data, std::size_t bytes) {
        control_.sum_int64_to(reinterpret_cast<std::int64_t*>(data), bytes / sizeof(std::int64_t), root);
    });
}

// A tensor in device memory on its way through a host buffer.
class StagedTransfer final : public Transfer {
public:
    StagedTransfer(Backend& backend, TensorView destination, std::vector<std::byte> staging)
        : backend_(backend), destination_(destination), staging_(std::move(staging)) {}

    std::byte* staging() { return staging_.data(); }
    void begin(std::unique_ptr<Transfer> transfer) { transfer_ = std::move(transfer); }
    bool done() override { return transfer_->done(); }
    void wait() override {
        transfer_->wait();
        if (!destination_.empty()) backend_.copy_from_host(staging_.data(), std::exchange(destination_, {}));
    }

private:
    Backend& backend_;
    TensorView destination_;  // empty for what is sent, and once it has been filled
    std::vector<std::byte> staging_;
    std::unique_ptr<Transfer> transfer_;
};

std::unique_ptr<Transfer> MpiCommunicator::start_send(ConstTensorView tensor, int peer) {
    if (backend_.host_memory()) return control_.start_send_bytes(tensor.bytes(), tensor.size_bytes(), peer);
    auto staged =
        std::make_unique<StagedTransfer>(backend_, TensorView(), std::vector<std::byte>(tensor.size_bytes()));
    if (!tensor.empty()) backend_.copy_to_host(tensor, staged->staging());
    staged->begin(control_.start_send_bytes(staged->staging(), tensor.size_bytes(), peer));
    return staged;
}

std::unique_ptr<Transfer> MpiCommunicator::start_receive(TensorView tensor, int peer) {
    if (backend_.host_memory()) {
        return control_.start_receive_bytes(tensor.bytes(), tensor.size_bytes(), peer);
    }
    auto staged =
        std::make_unique<StagedTransfer>(backend_, tensor, std::vector<std::byte>(tensor.size_bytes()));
    staged->begin(control_.start_receive_bytes(staged->staging(), tensor.size_bytes(), peer));
    return staged;
}

void MpiCommunicator::all_gather_rows(TensorView tensor, std::span<const RowRange> ranges) {
    require_disjoint(ranges, control_.size(), tensor.shape());
    for (int root = 0; root < control_.size(); ++root) {
        const RowRange& range = ranges[static_cast<std::size_t>(root)];
        if (!range.empty()) broadcast(tensor.rows(range.begin, range.end), root);
    }
}

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(Control& control, Backend& backend,
                                                    std::size_t staging_bytes) {
    return std::make_unique<MpiCommunicator>(control, backend, staging_bytes);
}

}  // namespace quantmill
