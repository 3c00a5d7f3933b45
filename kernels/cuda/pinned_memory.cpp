#include "kernels/cuda/pinned_memory.h"

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <future>

#include "kernels/cuda/check.h"
#include "kernels/error.h"

namespace quantmill::cuda {
namespace {

constexpr std::size_t kPage = std::size_t{4} << 10U;
constexpr std::size_t kHugePage = std::size_t{2} << 20U;

void unpin(void* memory) {
    cudaHostUnregister(memory);
    std::free(memory);
}

// Makes the system hand out the pages, which takes ten times as long as pinning them, since they are filled
// with zeros: some threads do it faster than one.
void touch(std::byte* memory, std::size_t bytes) {
    constexpr std::size_t kThreads = 4;
    const std::size_t part = std::max(kHugePage, (bytes / kThreads + kPage) / kPage * kPage);
    std::vector<std::future<void>> threads;
    for (std::size_t begin = 0; begin < bytes; begin += part) {
        threads.push_back(std::async(std::launch::async, [=] {
            const std::size_t end = std::min(begin + part, bytes);
            for (std::size_t i = begin; i < end; i += kPage) memory[i] = std::byte{0};
        }));
    }
    for (std::future<void>& thread : threads) thread.get();
}

// Null: there is no such memory. cudaHostAlloc takes several times as long: it knows no huge pages, has
// one thread, and keeps others from the device all the while.
void* pin(std::size_t bytes) {
    const std::size_t alignment = bytes < kHugePage ? kPage : kHugePage;
    const std::size_t size = (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
    void* memory = std::aligned_alloc(alignment, size);
    if (memory == nullptr) return nullptr;
    if (alignment == kHugePage) madvise(memory, size, MADV_HUGEPAGE);
    touch(static_cast<std::byte*>(memory), size);
    const cudaError_t status = cudaHostRegister(memory, size, cudaHostRegisterPortable);
    if (status == cudaSuccess) return memory;
    std::free(memory);
    if (status != cudaErrorMemoryAllocation) {
        check(status, "cudaHostRegister", {{"bytes", static_cast<long long>(size)}});
    }
    static_cast<void>(cudaGetLastError());
    return nullptr;
}

}  // namespace

PinnedMemory::~PinnedMemory() { release(); }

bool PinnedMemory::release() {
    const std::lock_guard lock(mutex_);
    const bool any = !free_.empty();
    for (const auto& [bytes, list] : free_) {
        for (void* memory : list) unpin(memory);
    }
    free_.clear();
    return any;
}

void* PinnedMemory::allocate(std::size_t bytes, const std::string& what) {
    {
        const std::lock_guard lock(mutex_);
        if (const auto found = free_.find(bytes); found != free_.end() && !found->second.empty()) {
            void* memory = found->second.back();
            found->second.pop_back();
            return memory;
        }
    }
    void* memory = nullptr;
    do {
        memory = pin(bytes);
    } while (memory == nullptr && release());
    if (memory == nullptr) {
        throw InfrastructureError(
            "out of pinned host memory: {} needs {} bytes; give the job more host memory (Slurm's --mem), or "
            "raise compute.device_memory so that less is kept on the host",
            what, bytes);
    }
    return memory;
}

void PinnedMemory::deallocate(void* memory, std::size_t bytes) noexcept {
    const std::lock_guard lock(mutex_);
    free_[bytes].push_back(memory);
}

}  // namespace quantmill::cuda
