#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "comm/communicator.h"

namespace quantmill {

// Bytes of tensors that came to this process from other ranks, by operation; a sum that ends on one rank
// counts where it comes from. Of all its communicators.
struct Traffic {
    std::atomic<std::uint64_t> broadcast{0}, sum{0}, gather{0}, stream{0};
};
Traffic& process_traffic();

// Does what `inner` does and counts it.
std::unique_ptr<Communicator> count_traffic(std::unique_ptr<Communicator> inner, const Control& control);

}  // namespace quantmill
