#include "kernels/cuda/pinned_memory.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/error.h"

namespace quantmill::cuda {

PinnedMemory::~PinnedMemory() { release(); }

bool PinnedMemory::release() {
    const std::lock_guard lock(mutex_);
    const bool any = !free_.empty();
    for (const auto& [bytes, list] : free_) {
        for (void* memory : list) cudaFreeHost(memory);
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
    cudaError_t status = cudaSuccess;
    do {
        status = cudaHostAlloc(&memory, std::max<std::size_t>(bytes, 1), cudaHostAllocPortable);
    } while (status == cudaErrorMemoryAllocation && release());
    if (status == cudaErrorMemoryAllocation) {
        static_cast<void>(cudaGetLastError());
        throw InfrastructureError(
            "out of pinned host memory: {} needs {} bytes; give the job more host memory (Slurm's --mem), or "
            "raise compute.device_memory so that less is kept on the host",
            what, bytes);
    }
    check(status, "cudaHostAlloc", {{"bytes", static_cast<long long>(bytes)}});
    return memory;
}

void PinnedMemory::deallocate(void* memory, std::size_t bytes) noexcept {
    const std::lock_guard lock(mutex_);
    free_[bytes].push_back(memory);
}

}  // namespace quantmill::cuda
