#pragma once

#include <cstdint>

#include "comm/control.h"

namespace quantmill {

// The ranks that run this test program (quantmill_mpi_test), which all run the same tests in the same
// order.
Control& test_control();

// The same on every rank; printed. QUANTMILL_TEST_SEED repeats a run.
std::uint64_t test_seed();

}  // namespace quantmill
