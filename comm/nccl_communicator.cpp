#include "comm/nccl_communicator.h"

#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/launcher.h"
#include "comm/row_ranges.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"

namespace quantmill {
namespace {

using Clock = std::chrono::steady_clock;

// The communicators of this process. Freeing what one holds can wait for the kernels of another, which may
// themselves wait for a rank that is lost: when one fails, all are aborted at the same time.
class OpenCommunicators {
public:
    void add(ncclComm_t communicator) {
        const std::lock_guard lock(mutex_);
        open_.insert(communicator);
    }
    // Aborting needs no peers: after an error they may never come.
    void abort(ncclComm_t communicator) {
        const std::lock_guard lock(mutex_);
        if (open_.erase(communicator) != 0) ncclCommAbort(communicator);
    }
    void abort_all() {
        const std::lock_guard lock(mutex_);
        std::vector<std::jthread> threads;
        for (ncclComm_t communicator : std::exchange(open_, {})) {
            threads.emplace_back([communicator] { ncclCommAbort(communicator); });
        }
    }

private:
    std::mutex mutex_;
    std::set<ncclComm_t> open_;
};

OpenCommunicators& open_communicators() {
    static OpenCommunicators all;
    return all;
}

class NcclCommunicator final : public Communicator {
public:
    NcclCommunicator(Control& control, CudaBackend& backend);
    ~NcclCommunicator() override;

    std::string name() const override { return "nccl"; }
    void broadcast(TensorView tensor, int root) override;
    void all_sum(TensorView sum) override;
    void all_gather_rows(TensorView tensor, std::span<const RowRange> ranges) override;
    void sum_to(TensorView sum, int root) override;
    std::unique_ptr<Transfer> start_send(ConstTensorView tensor, int peer) override;
    std::unique_ptr<Transfer> start_receive(TensorView tensor, int peer) override;
    bool receives_occupy_device() const override { return true; }
    void connect(std::span<const int> receivers, std::span<const int> senders) override;

private:
    class OwnTransfer;

    std::unique_ptr<Transfer> begin_transfer(std::size_t bytes, const std::string& what,
                                             const std::function<ncclResult_t()>& call);
    template <class Done>
    void poll(const std::string& what, const Done& done);
    void settle(ncclResult_t status, const std::string& what);
    void finish(const std::string& what);
    [[noreturn]] void fail(const std::string& what, const std::string& why);

    Control& control_;
    CudaBackend& backend_;
    ncclComm_t communicator_ = nullptr;
    cudaEvent_t event_ = nullptr;
    cudaStream_t transfers_ = nullptr;  // sends and receives, beside the backend's computation
    double timeout_ = wait_timeout();
    int exceptions_at_start_ = std::uncaught_exceptions();
};

ncclUniqueId shared_id(Control& control) {
    ncclUniqueId id{};
    std::string message;
    if (control.rank() == 0) {
        if (const ncclResult_t status = ncclGetUniqueId(&id); status != ncclSuccess) {
            throw InfrastructureError("rank 0 on {}: ncclGetUniqueId failed: {}", control.host(),
                                      ncclGetErrorString(status));
        }
        message.assign(id.internal, sizeof(id.internal));
    }
    message = control.broadcast(message, 0);
    std::memcpy(id.internal, message.data(), sizeof(id.internal));
    return id;
}

NcclCommunicator::NcclCommunicator(Control& control, CudaBackend& backend)
    : control_(control), backend_(backend) {
    cuda::check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    cuda::check(cudaStreamCreateWithFlags(&transfers_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    const ncclUniqueId id = shared_id(control);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    const ncclResult_t status =
        ncclCommInitRankConfig(&communicator_, control.size(), id, control.rank(), &config);
    if (communicator_ != nullptr) open_communicators().add(communicator_);
    settle(status, "the ranks' first meeting (ncclCommInitRankConfig)");
}

NcclCommunicator::~NcclCommunicator() {
    if (std::uncaught_exceptions() > exceptions_at_start_) {
        open_communicators().abort_all();
    } else {
        open_communicators().abort(communicator_);
    }
    cudaEventDestroy(event_);
    cudaStreamDestroy(transfers_);
}

void NcclCommunicator::fail(const std::string& what, const std::string& why) {
    const std::string last = communicator_ != nullptr ? ncclGetLastError(communicator_) : "";
    open_communicators().abort_all();
    throw InfrastructureError("rank {} of {} on {}, CUDA device {}: {}: {}{}", control_.rank(),
                              control_.size(), control_.host(), backend_.device(), what, why,
                              last.empty() ? "" : fmt::format(" ({})", last));
}

template <class Done>
void NcclCommunicator::poll(const std::string& what, const Done& done) {
    const auto deadline = Clock::now() + std::chrono::duration<double>(timeout_);
    const auto busy_until = Clock::now() + std::chrono::milliseconds(20);
    while (!done()) {
        note_poll();
        ncclResult_t status = ncclSuccess;
        const ncclResult_t asked = ncclCommGetAsyncError(communicator_, &status);
        if (asked != ncclSuccess) fail(what, ncclGetErrorString(asked));
        if (status != ncclSuccess && status != ncclInProgress) fail(what, ncclGetErrorString(status));
        if (Clock::now() > deadline) {
            fail(what, fmt::format("waited {:.0f} s for the other ranks (QUANTMILL_TIMEOUT)", timeout_));
        }
        if (Clock::now() > busy_until) std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
}

// Waits until NCCL has taken a call.
void NcclCommunicator::settle(ncclResult_t status, const std::string& what) {
    if (status != ncclSuccess && status != ncclInProgress) fail(what, ncclGetErrorString(status));
    poll(what, [&] {
        ncclResult_t now = ncclSuccess;
        return ncclCommGetAsyncError(communicator_, &now) == ncclSuccess && now == ncclSuccess;
    });
}

// Waits until the device has done what was called.
void NcclCommunicator::finish(const std::string& what) {
    cuda::check(cudaEventRecord(event_, backend_.stream()), "cudaEventRecord");
    poll(what, [&] {
        const cudaError_t status = cudaEventQuery(event_);
        if (status != cudaErrorNotReady) cuda::check(status, "cudaEventQuery");
        return status == cudaSuccess;
    });
}

void NcclCommunicator::broadcast(TensorView tensor, int root) {
    if (tensor.empty()) return;
    const std::string what = fmt::format("a broadcast of {} bytes from rank {}", tensor.size_bytes(), root);
    settle(ncclBroadcast(tensor.bytes(), tensor.bytes(), tensor.size_bytes(), ncclUint8, root, communicator_,
                         backend_.stream()),
           what);
    finish(what);
}

void NcclCommunicator::all_sum(TensorView sum) {
    require_integers(sum);
    if (sum.empty()) return;
    const auto count = static_cast<std::size_t>(sum.shape().count());
    const std::string what = fmt::format("a sum of {} numbers over all ranks", count);
    settle(
        ncclAllReduce(sum.bytes(), sum.bytes(), count, ncclInt64, ncclSum, communicator_, backend_.stream()),
        what);
    finish(what);
}

void NcclCommunicator::all_gather_rows(TensorView tensor, std::span<const RowRange> ranges) {
    require_disjoint(ranges, control_.size(), tensor.shape());
    const std::string what = fmt::format("gathering the rows of {}", to_string(tensor.shape()));
    settle(ncclGroupStart(), what);
    for (int root = 0; root < control_.size(); ++root) {
        const RowRange& range = ranges[static_cast<std::size_t>(root)];
        if (range.empty()) continue;
        const TensorView part = tensor.rows(range.begin, range.end);
        const ncclResult_t status = ncclBroadcast(part.bytes(), part.bytes(), part.size_bytes(), ncclUint8,
                                                  root, communicator_, backend_.stream());
        if (status != ncclSuccess && status != ncclInProgress) fail(what, ncclGetErrorString(status));
    }
    settle(ncclGroupEnd(), what);
    finish(what);
}

void NcclCommunicator::sum_to(TensorView sum, int root) {
    require_integers(sum);
    if (sum.empty()) return;
    const auto count = static_cast<std::size_t>(sum.shape().count());
    const std::string what = fmt::format("a sum of {} numbers on rank {}", count, root);
    settle(ncclReduce(sum.bytes(), sum.bytes(), count, ncclInt64, ncclSum, root, communicator_,
                      backend_.stream()),
           what);
    finish(what);
}

class NcclCommunicator::OwnTransfer final : public Transfer {
public:
    OwnTransfer(NcclCommunicator& owner, std::string what) : owner_(owner), what_(std::move(what)) {
        cuda::check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    }
    ~OwnTransfer() override { cudaEventDestroy(event_); }

    void begin() { cuda::check(cudaEventRecord(event_, owner_.transfers_), "cudaEventRecord"); }
    bool done() override {
        const cudaError_t status = cudaEventQuery(event_);
        if (status != cudaErrorNotReady) cuda::check(status, "cudaEventQuery");
        return status == cudaSuccess;
    }
    void wait() override {
        owner_.poll(what_, [this] { return done(); });
    }

private:
    NcclCommunicator& owner_;
    std::string what_;
    cudaEvent_t event_ = nullptr;
};

// What the backend has been asked so far comes before the transfer.
std::unique_ptr<Transfer> NcclCommunicator::begin_transfer(std::size_t bytes, const std::string& what,
                                                           const std::function<ncclResult_t()>& call) {
    cuda::check(cudaEventRecord(event_, backend_.stream()), "cudaEventRecord");
    cuda::check(cudaStreamWaitEvent(transfers_, event_), "cudaStreamWaitEvent");
    auto transfer = std::make_unique<OwnTransfer>(*this, what);
    if (bytes > 0) settle(call(), what);
    transfer->begin();
    return transfer;
}

std::unique_ptr<Transfer> NcclCommunicator::start_send(ConstTensorView tensor, int peer) {
    return begin_transfer(
        tensor.size_bytes(), fmt::format("{} bytes to reach rank {}", tensor.size_bytes(), peer), [&] {
            return ncclSend(tensor.bytes(), tensor.size_bytes(), ncclUint8, peer, communicator_, transfers_);
        });
}

std::unique_ptr<Transfer> NcclCommunicator::start_receive(TensorView tensor, int peer) {
    return begin_transfer(
        tensor.size_bytes(), fmt::format("{} bytes from rank {}", tensor.size_bytes(), peer), [&] {
            return ncclRecv(tensor.bytes(), tensor.size_bytes(), ncclUint8, peer, communicator_, transfers_);
        });
}

// A byte on each way: NCCL sets up a way when it is first used, which takes about a second.
void NcclCommunicator::connect(std::span<const int> receivers, std::span<const int> senders) {
    const auto ways = static_cast<std::int64_t>(receivers.size() + senders.size());
    Tensor bytes = backend_.empty({ways + 1}, DType::u8, "first messages");
    backend_.zero(bytes);
    const std::string what = "the ranks' first messages";
    std::byte* next = bytes.view().bytes();
    settle(ncclBroadcast(next, next, 1, ncclUint8, 0, communicator_, backend_.stream()), what);
    if (ways > 0) {
        settle(ncclGroupStart(), what);
        const auto require = [&](ncclResult_t status) {
            if (status != ncclSuccess && status != ncclInProgress) fail(what, ncclGetErrorString(status));
        };
        for (const int peer : receivers) {
            require(ncclSend(++next, 1, ncclUint8, peer, communicator_, backend_.stream()));
        }
        for (const int peer : senders) {
            require(ncclRecv(++next, 1, ncclUint8, peer, communicator_, backend_.stream()));
        }
        settle(ncclGroupEnd(), what);
    }
    finish(what);
}

}  // namespace

bool each_rank_has_its_gpu(Control& control, const Backend& backend) {
    const auto devices = control.all_gather(backend.unique_device());
    return std::set<std::string>(devices.begin(), devices.end()).size() == devices.size();
}

std::unique_ptr<Communicator> make_nccl_communicator(Control& control, Backend& backend) {
    return std::make_unique<NcclCommunicator>(control, dynamic_cast<CudaBackend&>(backend));
}

}  // namespace quantmill
