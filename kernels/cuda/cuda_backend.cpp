#include "kernels/cuda/cuda_backend.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "kernels/cuda/check.h"
#include "kernels/cuda/copy_lane.h"
#include "kernels/cuda/launch.h"
#include "kernels/error.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

using cuda::check;

// Freed memory stays in the pool, since the next block asks for the same sizes; a limit of 0 is none.
cudaMemPool_t make_pool(int device, std::size_t limit) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, device};
    properties.maxSize = limit;
    cudaMemPool_t pool = nullptr;
    check(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate", {{"device", device}});
    std::uint64_t threshold = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold),
          "cudaMemPoolSetAttribute", {{"device", device}});
    return pool;
}

std::size_t pool_bytes(cudaMemPool_t pool, cudaMemPoolAttr attribute) {
    std::uint64_t bytes = 0;
    check(cudaMemPoolGetAttribute(pool, attribute, &bytes), "cudaMemPoolGetAttribute",
          {{"attribute", attribute}});
    return bytes;
}

long long as_argument(std::size_t bytes) { return static_cast<long long>(bytes); }

}  // namespace

int CudaBackend::visible_devices() {
    int count = 0;
    // No driver and no device are answers here, not failures.
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        static_cast<void>(cudaGetLastError());
        return 0;
    }
    return count;
}

CudaBackend::CudaBackend(int local_rank, std::optional<std::size_t> memory_limit)
    : memory_limit_(memory_limit) {
    const int devices = visible_devices();
    if (devices == 0) {
        throw BadInput(
            "compute.backend: cuda, but no CUDA device is visible; see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or choose cpu");
    }
    device_ = local_rank % devices;
    check(cudaSetDevice(device_), "cudaSetDevice", {{"device", device_}});
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    pool_ = make_pool(device_, memory_limit.value_or(0));
    gemm_ = std::make_unique<cuda::Gemm>();
}

CudaBackend::~CudaBackend() {
    cudaStreamSynchronize(stream_);
    gemm_.reset();
    cudaMemPoolDestroy(pool_);
    cudaStreamDestroy(stream_);
}

std::string CudaBackend::description() const {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device_), "cudaGetDeviceProperties", {{"device", device_}});
    int runtime = 0;
    int driver = 0;
    check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    return fmt::format(
        "{} (compute capability {}.{}, {} multiprocessors, {:.1f} GB), CUDA {}.{}, "
        "driver's CUDA {}.{}, cuBLASLt {}",
        properties.name, properties.major, properties.minor, properties.multiProcessorCount,
        static_cast<double>(properties.totalGlobalMem) / 1e9, runtime / 1000, runtime % 1000 / 10,
        driver / 1000, driver % 1000 / 10, cublasLtGetVersion());
}

std::string CudaBackend::unique_device() const {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device_), "cudaGetDeviceProperties", {{"device", device_}});
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(properties.uuid.bytes);
    return fmt::format("{:02x}", fmt::join(bytes, bytes + sizeof(properties.uuid.bytes), ""));
}

std::size_t CudaBackend::free_memory(int ranks) const {
    std::size_t free = 0;
    std::size_t total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    const std::size_t used = pool_bytes(pool_, cudaMemPoolAttrUsedMemCurrent);
    free += pool_bytes(pool_, cudaMemPoolAttrReservedMemCurrent) - used;
    free /= static_cast<std::size_t>(ranks);
    return memory_limit_ ? std::min(free, *memory_limit_ - std::min(used, *memory_limit_)) : free;
}

std::size_t CudaBackend::peak_memory() const { return pool_bytes(pool_, cudaMemPoolAttrReservedMemHigh); }

void* CudaBackend::allocate(std::size_t bytes, const std::string& what) {
    void* memory = nullptr;
    const cudaError_t status =
        cudaMallocFromPoolAsync(&memory, std::max<std::size_t>(bytes, 1), pool_, stream_);
    if (status == cudaErrorMemoryAllocation) {
        static_cast<void>(cudaGetLastError());
        out_of_memory(bytes, what);
    }
    check(status, "cudaMallocFromPoolAsync", {{"bytes", as_argument(bytes)}});
    allocations_.emplace(memory, Allocation{bytes, what});
    return memory;
}

void CudaBackend::deallocate(void* memory) noexcept {
    allocations_.erase(memory);
    cudaFreeAsync(memory, stream_);
}

void CudaBackend::out_of_memory(std::size_t bytes, const std::string& what) const {
    constexpr std::size_t kShown = 6;
    std::vector<Allocation> held;
    std::size_t sum = 0;
    for (const auto& [memory, allocation] : allocations_) {
        held.push_back(allocation);
        sum += allocation.bytes;
    }
    std::sort(held.begin(), held.end(), [](const Allocation& a, const Allocation& b) {
        return std::pair(b.bytes, a.what) < std::pair(a.bytes, b.what);
    });
    std::string list;
    for (std::size_t i = 0; i < std::min(kShown, held.size()); ++i) {
        list += fmt::format("{}{} {}", i == 0 ? "" : ", ", held[i].what, held[i].bytes);
    }
    throw InfrastructureError(
        "out of memory on CUDA device {}: {} needs {} bytes, {} are free; {} bytes are held by {} "
        "allocations, the largest: {}. Lower compute.device_memory or use more GPUs",
        device_, what, bytes, free_memory(1), sum, held.size(), list);
}

void CudaBackend::copy_from_host(const void* source, TensorView destination) {
    if (destination.size_bytes() == 0) return;
    upload_bytes(source, destination);
    synchronize();  // the caller may change its memory now, pinned or not
}

void CudaBackend::upload_bytes(const void* source, TensorView destination) {
    check(cudaMemcpyAsync(destination.bytes(), source, destination.size_bytes(), cudaMemcpyHostToDevice,
                          stream_),
          "cudaMemcpyAsync to the device", {{"bytes", as_argument(destination.size_bytes())}});
}

void CudaBackend::copy_to_host(ConstTensorView source, void* destination) {
    if (source.size_bytes() == 0) return;
    check(cudaMemcpyAsync(destination, source.bytes(), source.size_bytes(), cudaMemcpyDeviceToHost, stream_),
          "cudaMemcpyAsync to the host", {{"bytes", as_argument(source.size_bytes())}});
    synchronize();
}

void CudaBackend::copy(ConstTensorView source, TensorView destination) {
    require_operands(
        source.dtype() == destination.dtype() && source.shape().count() == destination.shape().count(),
        "copy", {source, destination});
    if (source.size_bytes() == 0) return;
    check(cudaMemcpyAsync(destination.bytes(), source.bytes(), source.size_bytes(), cudaMemcpyDeviceToDevice,
                          stream_),
          "cudaMemcpyAsync on the device", {{"bytes", as_argument(source.size_bytes())}});
}

void CudaBackend::zero(TensorView tensor) {
    if (tensor.size_bytes() == 0) return;
    check(cudaMemsetAsync(tensor.bytes(), 0, tensor.size_bytes(), stream_), "cudaMemsetAsync",
          {{"bytes", as_argument(tensor.size_bytes())}});
}

void* CudaBackend::allocate_host(std::size_t bytes, const std::string& what) {
    // A new thread stands on device 0, where pinning would open a context.
    check(cudaSetDevice(device_), "cudaSetDevice", {{"device", device_}});
    return pinned_.allocate(bytes, what);
}

void CudaBackend::deallocate_host(void* memory, std::size_t bytes) noexcept {
    pinned_.deallocate(memory, bytes);
}

std::unique_ptr<CopyLane> CudaBackend::make_copy_lane() {
    return std::make_unique<cuda::CudaCopyLane>(device_);
}

EventPtr CudaBackend::record() { return std::make_shared<cuda::CudaEvent>(device_, stream_); }

void CudaBackend::after(const Event& event) { cuda::wait_for(event, stream_); }

void CudaBackend::synchronize() { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

}  // namespace quantmill
