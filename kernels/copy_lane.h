#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "kernels/tensor.h"

namespace quantmill {

// A point in the order of a backend's operations or of a lane's copies.
class Event {
public:
    Event() = default;
    virtual ~Event() = default;
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    virtual void wait() const = 0;  // until everything before it is done
    // Seconds between two events of the same backend on the device's clock; waits for both.
    virtual double seconds_since(const Event& earlier) const = 0;
};
using EventPtr = std::shared_ptr<const Event>;

// Copies between pinned host memory and a backend's memory that run beside its operations, one after the
// other. One thread uses a lane at a time.
class CopyLane {
public:
    CopyLane() = default;
    virtual ~CopyLane() = default;
    CopyLane(const CopyLane&) = delete;
    CopyLane& operator=(const CopyLane&) = delete;

    virtual void after(const Event& event) = 0;  // later copies begin when it has passed
    // The host memory must stay as it is until a later event of the lane has passed.
    virtual void upload(const void* host, TensorView destination) = 0;
    virtual void download(ConstTensorView source, void* host) = 0;
    virtual EventPtr record() = 0;
};

// Owns pinned host memory, which a backend copies at full speed; made by Backend::host_buffer. Move only.
class HostBuffer {
public:
    HostBuffer() = default;
    HostBuffer(Backend& backend, std::size_t bytes, const std::string& what);
    ~HostBuffer();
    HostBuffer(HostBuffer&& other) noexcept;
    HostBuffer& operator=(HostBuffer&& other) noexcept;
    HostBuffer(const HostBuffer&) = delete;
    HostBuffer& operator=(const HostBuffer&) = delete;

    std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }

private:
    Backend* backend_ = nullptr;
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace quantmill
