#include "comm/communicator.h"
#include "comm/counting_communicator.h"
#include "comm/mpi_communicator.h"

#ifdef QUANTMILL_WITH_NCCL
#include "comm/nccl_communicator.h"
#endif

namespace quantmill {

std::string choose_communicator(const std::string& kind, [[maybe_unused]] Control& control,
                                [[maybe_unused]] Backend& backend) {
    if (kind != "auto" && kind != "mpi" && kind != "nccl") {
        throw BadInput("compute.communicator is '{}'; it must be auto, nccl or mpi", kind);
    }
#ifdef QUANTMILL_WITH_NCCL
    const bool cuda = backend.name() == "cuda";
    if (kind == "nccl" && !cuda) {
        throw BadInput(
            "compute.communicator is nccl, which needs GPUs, but the backend is {}: say auto or mpi",
            backend.name());
    }
    if (cuda && kind != "mpi" && (kind == "nccl" || control.size() > 1)) {
        if (each_rank_has_its_gpu(control, backend)) return "nccl";
        if (kind == "nccl") {
            throw BadInput(
                "compute.communicator is nccl, but several ranks share a GPU, which NCCL refuses: start one "
                "rank a GPU, or say auto or mpi");
        }
    }
#endif
    if (kind == "nccl") {
        throw BadInput(
            "compute.communicator is nccl, which needs the CUDA backend; this program was built without "
            "it: build with `cmake --preset cuda`, or say auto or mpi");
    }
    return "mpi";
}

std::unique_ptr<Communicator> make_communicator(const std::string& kind, Control& control, Backend& backend) {
#ifdef QUANTMILL_WITH_NCCL
    if (choose_communicator(kind, control, backend) == "nccl") {
        return count_traffic(make_nccl_communicator(control, backend), control);
    }
#else
    choose_communicator(kind, control, backend);
#endif
    return count_traffic(make_mpi_communicator(control, backend), control);
}

}  // namespace quantmill
