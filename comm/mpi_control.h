#pragma once

#include <cstddef>
#include <memory>

#include "comm/control.h"

namespace quantmill {

struct MpiOptions {
    double timeout = 0.0;  // seconds; 0: wait_timeout()
    // MPI counts are int, so that one message holds at most 2 GiB.
    std::size_t max_message = std::size_t{1} << 30U;  // bytes, at least 8
};

// A Control over a duplicate of MPI_COMM_WORLD; the first one initialises MPI.
std::unique_ptr<Control> make_mpi_control(const MpiOptions& options);

}  // namespace quantmill
