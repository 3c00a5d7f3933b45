#pragma once

#include <cuda_runtime_api.h>

#include "kernels/copy_lane.h"

namespace quantmill::cuda {

// Recorded on a stream of `device` when it is made; any thread may wait for it.
class CudaEvent final : public Event {
public:
    CudaEvent(int device, cudaStream_t stream);
    ~CudaEvent() override;
    void wait() const override;
    double seconds_since(const Event& earlier) const override;
    cudaEvent_t get() const { return event_; }

private:
    int device_;
    cudaEvent_t event_ = nullptr;
};

// Later work of the stream begins when the event has passed.
void wait_for(const Event& event, cudaStream_t stream);

// Copies on a stream of its own; may be used by a thread that has not chosen a device.
class CudaCopyLane final : public CopyLane {
public:
    explicit CudaCopyLane(int device);
    ~CudaCopyLane() override;
    void after(const Event& event) override;
    void upload(const void* host, TensorView destination) override;
    void download(ConstTensorView source, void* host) override;
    EventPtr record() override;

private:
    void choose_device() const;

    int device_;
    cudaStream_t stream_ = nullptr;
};

}  // namespace quantmill::cuda
