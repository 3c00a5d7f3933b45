#include "kernels/make_backend.h"

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/error.h"

#ifdef QUANTMILL_WITH_CUDA
#include "kernels/cuda/cuda_backend.h"
#endif

namespace quantmill {
namespace {

std::unique_ptr<Backend> make_cuda_backend([[maybe_unused]] int local_rank,
                                           [[maybe_unused]] std::optional<std::size_t> device_memory) {
#ifdef QUANTMILL_WITH_CUDA
    return std::make_unique<CudaBackend>(local_rank, device_memory);
#else
    throw BadInput("this binary was built without CUDA: configure with --preset cuda");
#endif
}

bool cuda_device_visible() {
#ifdef QUANTMILL_WITH_CUDA
    return CudaBackend::visible_devices() > 0;
#else
    return false;
#endif
}

// The user's OMP_NUM_THREADS, else the rank's share of the machine, but no more cores than the
// launcher bound the rank to.
int threads_of_rank(int local_ranks) {
    if (std::getenv("OMP_NUM_THREADS") != nullptr) return omp_get_max_threads();
    const int cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    return std::clamp(cores / std::max(1, local_ranks), 1, omp_get_num_procs());
}

}  // namespace

std::vector<std::string> built_backends() {
#ifdef QUANTMILL_WITH_CUDA
    return {"cpu", "cuda"};
#else
    return {"cpu"};
#endif
}

std::unique_ptr<Backend> make_backend(const std::string& kind, int local_rank, int local_ranks,
                                      std::optional<std::size_t> device_memory) {
    if (kind == "cuda" || (kind == "auto" && cuda_device_visible())) {
        return make_cuda_backend(local_rank, device_memory);
    }
    if (kind == "cpu" || kind == "auto") {
        return std::make_unique<CpuBackend>(threads_of_rank(local_ranks));
    }
    throw BadInput("unknown backend '{}': auto, cpu or cuda", kind);
}

}  // namespace quantmill
