// Host memory, and device memory that is staged in pieces of some odd size.
#include "comm/mpi_communicator.h"
#include "tests/comm/communicator_test.h"
#include "tests/comm/memory_backend.h"

namespace quantmill {
namespace {

Memory staged(const std::string& name, bool host, std::size_t staging_bytes) {
    return {name,
            [host](Control&, std::string&) -> std::unique_ptr<Backend> {
                return std::make_unique<MemoryBackend>(host);
            },
            [staging_bytes](Control& control, Backend& backend) {
                return make_mpi_communicator(control, backend, staging_bytes);
            }};
}

}  // namespace

std::vector<Memory> tested_memories() {
    return {staged("host", true, 0), staged("in_small_pieces", false, 100),
            staged("in_large_pieces", false, std::size_t{64} << 20U)};
}

}  // namespace quantmill
