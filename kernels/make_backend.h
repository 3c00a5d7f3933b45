#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace quantmill {

// Names of the backends that this binary holds: "cpu", and "cuda" when it was built with CUDA.
std::vector<std::string> built_backends();

// kind: "auto" (cuda when it is built and a GPU is visible, else cpu), "cpu" or "cuda". local_rank picks
// the GPU; the CPU's cores are shared among the host's local_ranks ranks unless OMP_NUM_THREADS is set.
// device_memory: bytes that may be taken of a GPU's memory; nothing: what is free.
// Throws BadInput when the backend is not built or no device is visible.
std::unique_ptr<Backend> make_backend(const std::string& kind, int local_rank, int local_ranks = 1,
                                      std::optional<std::size_t> device_memory = {});

}  // namespace quantmill
