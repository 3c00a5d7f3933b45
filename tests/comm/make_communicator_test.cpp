#include <gtest/gtest.h>

#include "comm/communicator.h"
#include "tests/comm/memory_backend.h"
#include "tests/mpi_main.h"

namespace quantmill {
namespace {

TEST(MakeCommunicator, KnowsItsKinds) {
    MemoryBackend backend(true);
    for (const char* kind : {"auto", "mpi"}) {
        EXPECT_EQ(choose_communicator(kind, test_control(), backend), "mpi");
        EXPECT_EQ(make_communicator(kind, test_control(), backend)->name(), "mpi");
    }
    EXPECT_THROW(make_communicator("gloo", test_control(), backend), BadInput);
    EXPECT_THROW(make_communicator("nccl", test_control(), backend), BadInput);
}

}  // namespace
}  // namespace quantmill
