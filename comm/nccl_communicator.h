#pragma once

#include <memory>

#include "comm/communicator.h"

namespace quantmill {

// Whether NCCL can serve these ranks: it refuses two on one GPU. Collective.
bool each_rank_has_its_gpu(Control& control, const Backend& backend);

// Tensors over NCCL on the backend's stream. Every operation is waited for: NCCL's asynchronous errors and
// the deadline (QUANTMILL_TIMEOUT) are polled meanwhile, and a failure aborts the communicator and throws
// InfrastructureError with rank, host and what was waited for.
std::unique_ptr<Communicator> make_nccl_communicator(Control& control, Backend& backend);

}  // namespace quantmill
