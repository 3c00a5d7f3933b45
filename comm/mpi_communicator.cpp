#include "comm/mpi_communicator.h"

#include <algorithm>
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
