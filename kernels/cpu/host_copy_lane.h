#pragma once

#include <chrono>
#include <cstring>

#include "kernels/copy_lane.h"

namespace quantmill {

// On the host everything before has happened when an event is recorded.
class HostEvent final : public Event {
public:
    void wait() const override {}
    double seconds_since(const Event& earlier) const override {
        return std::chrono::duration<double>(time_ - dynamic_cast<const HostEvent&>(earlier).time_).count();
    }

private:
    std::chrono::steady_clock::time_point time_ = std::chrono::steady_clock::now();
};

// Copies at once.
class HostCopyLane final : public CopyLane {
public:
    void after(const Event&) override {}
    void upload(const void* host, TensorView destination) override {
        if (!destination.empty()) std::memcpy(destination.bytes(), host, destination.size_bytes());
    }
    void download(ConstTensorView source, void* host) override {
        if (!source.empty()) std::memcpy(host, source.bytes(), source.size_bytes());
    }
    EventPtr record() override { return std::make_shared<HostEvent>(); }
};

}  // namespace quantmill
