#pragma once

#include <cstddef>
#include <memory>

#include "comm/communicator.h"

namespace quantmill {

// Tensors over the Control's host messages; those in device memory pass through a host buffer of
// `staging_bytes` (at least 8).
std::unique_ptr<Communicator> make_mpi_communicator(Control& control, Backend& backend,
                                                    std::size_t staging_bytes = std::size_t{64} << 20U);

}  // namespace quantmill
