#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace quantmill::cuda {

// Pinned host memory that is kept for the next request of the same size: pinning costs far more than
// copying (0.2 ms a MB), and each block asks for the sizes of the one before. Thread-safe.
class PinnedMemory {
public:
    PinnedMemory() = default;
    ~PinnedMemory();
    PinnedMemory(const PinnedMemory&) = delete;
    PinnedMemory& operator=(const PinnedMemory&) = delete;

    void* allocate(std::size_t bytes, const std::string& what);
    void deallocate(void* memory, std::size_t bytes) noexcept;

private:
    bool release();  // gives back what nobody uses; false when there is nothing

    std::mutex mutex_;
    std::map<std::size_t, std::vector<void*>> free_;  // by size
};

}  // namespace quantmill::cuda
