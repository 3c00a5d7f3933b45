#include "kernels/cpu/cpu_backend.h"

#include <cblas.h>
#include <fmt/format.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "kernels/cpu/free_memory.h"
#include "kernels/cpu/host_copy_lane.h"
#include "kernels/error.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

constexpr std::size_t kAlignment = 64;  // a cache line and the widest vector register

std::string cpu_model() {
    std::ifstream info("/proc/cpuinfo");
    for (std::string line; std::getline(info, line);) {
        if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
    }
    return "unknown processor";
}

bool serial_blas() { return openblas_get_parallel() == 0; }

}  // namespace

CpuBackend::CpuBackend(int threads) {
    // Order matters: with an OpenMP build the first call also sets OpenMP's own number of threads.
    openblas_set_num_threads(1);
    omp_set_num_threads(serial_blas() ? 1 : threads);
}

std::string CpuBackend::description() const {
    std::string text = fmt::format("{}, {} threads, {} ({} kernels)", cpu_model(), omp_get_max_threads(),
                                   openblas_get_config(), openblas_get_corename());
    if (serial_blas()) text += "; a serial OpenBLAS allows one thread only: install its pthread build";
    return text;
}

std::size_t CpuBackend::free_memory(int ranks) const {
    return free_host_memory() / static_cast<std::size_t>(ranks);
}

std::size_t CpuBackend::peak_memory() const { return peak_host_memory(); }

int CpuBackend::threads() const { return omp_get_max_threads(); }

void* CpuBackend::allocate(std::size_t bytes, const std::string& what) {
    const std::size_t rounded = (bytes / kAlignment + 1) * kAlignment;
    void* memory = std::aligned_alloc(kAlignment, rounded);
    if (memory == nullptr) {
        throw InfrastructureError("out of host memory: {} needs {} bytes, {} are free", what, bytes,
                                  free_memory(1));
    }
    return memory;
}

void CpuBackend::deallocate(void* memory) noexcept { std::free(memory); }

void CpuBackend::copy_from_host(const void* source, TensorView destination) {
    if (destination.size_bytes() > 0) {
        std::memcpy(destination.bytes(), source, destination.size_bytes());
    }
}

void CpuBackend::copy_to_host(ConstTensorView source, void* destination) {
    if (source.size_bytes() > 0) std::memcpy(destination, source.bytes(), source.size_bytes());
}

void CpuBackend::copy(ConstTensorView source, TensorView destination) {
    require_operands(
        source.dtype() == destination.dtype() && source.shape().count() == destination.shape().count(),
        "copy", {source, destination});
    copy_to_host(source, destination.bytes());
}

std::unique_ptr<CopyLane> CpuBackend::make_copy_lane() { return std::make_unique<HostCopyLane>(); }

EventPtr CpuBackend::record() { return std::make_shared<HostEvent>(); }

void CpuBackend::zero(TensorView tensor) {
    if (tensor.size_bytes() > 0) std::memset(tensor.bytes(), 0, tensor.size_bytes());
}

}  // namespace quantmill
