// The memory of a GPU for each rank, over NCCL, and staged through the host.
#include <fmt/format.h>

#include <cstdlib>

#include "kernels/cuda/cuda_backend.h"
#include "tests/comm/communicator_test.h"

namespace quantmill {
namespace {

// QUANTMILL_REQUIRE_GPU: too few GPUs are an error then.
std::unique_ptr<Backend> gpu_of_rank(Control& control, std::string& obstacle) {
    const int devices = CudaBackend::visible_devices();
    if (devices >= control.local_size()) return std::make_unique<CudaBackend>(control.local_rank());
    obstacle =
        fmt::format("NCCL needs a GPU for each rank: {} visible, {} needed", devices, control.local_size());
    if (std::getenv("QUANTMILL_REQUIRE_GPU") != nullptr) throw InfrastructureError("{}", obstacle);
    return nullptr;
}

Memory gpus(const std::string& kind) {
    return {kind, gpu_of_rank,
            [kind](Control& control, Backend& backend) { return make_communicator(kind, control, backend); }};
}

}  // namespace

std::vector<Memory> tested_memories() { return {gpus("nccl"), gpus("mpi")}; }

}  // namespace quantmill
