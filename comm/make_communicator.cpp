#include "comm/communicator.h"
#include "comm/mpi_communicator.h"

#ifdef QUANTMILL_WITH_NCCL
#include "comm/nccl_communicator.h"
#endif

namespace quantmill {

std::unique_ptr<Communicator> make_communicator(const std::string& kind, Control& control, Backend& backend) {
    if (kind != "auto" && kind != "mpi" && kind != "nccl") {
        throw BadInput("compute.communicator is '{}'; it must be auto, nccl or mpi", kind);
    }
#ifdef QUANTMILL_WITH_NCCL
    if (kind == "nccl" || (kind == "auto" && backend.name() == "cuda")) {
        return make_nccl_communicator(control, backend);
    }
#endif
    if (kind == "nccl") {
        throw BadInput(
            "compute.communicator is nccl, which needs the CUDA backend; this program was built without "
            "it: build with `cmake --preset cuda`, or say auto or mpi");
    }
    return make_mpi_communicator(control, backend);
}

}  // namespace quantmill
