#include "kernels/cuda/copy_lane.h"

#include "kernels/cuda/check.h"

namespace quantmill::cuda {
namespace {

long long as_argument(std::size_t bytes) { return static_cast<long long>(bytes); }

}  // namespace

CudaEvent::CudaEvent(int device, cudaStream_t stream) : device_(device) {
    // Who waits is a thread of a machine that other ranks share: let it sleep.
    check(cudaEventCreateWithFlags(&event_, cudaEventBlockingSync), "cudaEventCreateWithFlags");
    check(cudaEventRecord(event_, stream), "cudaEventRecord");
}

CudaEvent::~CudaEvent() { cudaEventDestroy(event_); }

void CudaEvent::wait() const {
    // A new thread stands on device 0, where it would open a context.
    check(cudaSetDevice(device_), "cudaSetDevice", {{"device", device_}});
    check(cudaEventSynchronize(event_), "cudaEventSynchronize");
}

double CudaEvent::seconds_since(const Event& earlier) const {
    wait();
    float milliseconds = 0.0F;
    check(cudaEventElapsedTime(&milliseconds, dynamic_cast<const CudaEvent&>(earlier).event_, event_),
          "cudaEventElapsedTime");
    return static_cast<double>(milliseconds) * 1e-3;
}

void wait_for(const Event& event, cudaStream_t stream) {
    check(cudaStreamWaitEvent(stream, dynamic_cast<const CudaEvent&>(event).get()), "cudaStreamWaitEvent");
}

CudaCopyLane::CudaCopyLane(int device) : device_(device) {
    choose_device();
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
}

CudaCopyLane::~CudaCopyLane() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
}

void CudaCopyLane::choose_device() const {
    check(cudaSetDevice(device_), "cudaSetDevice", {{"device", device_}});
}

void CudaCopyLane::after(const Event& event) { wait_for(event, stream_); }

void CudaCopyLane::upload(const void* host, TensorView destination) {
    if (destination.empty()) return;
    choose_device();
    check(
        cudaMemcpyAsync(destination.bytes(), host, destination.size_bytes(), cudaMemcpyHostToDevice, stream_),
        "cudaMemcpyAsync to the device", {{"bytes", as_argument(destination.size_bytes())}});
}

void CudaCopyLane::download(ConstTensorView source, void* host) {
    if (source.empty()) return;
    choose_device();
    check(cudaMemcpyAsync(host, source.bytes(), source.size_bytes(), cudaMemcpyDeviceToHost, stream_),
          "cudaMemcpyAsync to the host", {{"bytes", as_argument(source.size_bytes())}});
}

EventPtr CudaCopyLane::record() {
    choose_device();
    return std::make_shared<CudaEvent>(device_, stream_);
}

}  // namespace quantmill::cuda
