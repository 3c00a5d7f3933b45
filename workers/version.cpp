#include "workers/version.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "comm/control.h"
#include "kernels/make_backend.h"
#include "quantmill_build.h"
#include "quantmill_commit.h"

namespace quantmill {

std::string version_number() { return QUANTMILL_VERSION; }

std::string short_version() { return fmt::format("{} (commit {})", QUANTMILL_VERSION, QUANTMILL_COMMIT); }

std::map<std::string, std::string> library_versions() {
    return {{"MPI", mpi_library()}, {"BLAS", QUANTMILL_BLAS}, {"HDF5", QUANTMILL_HDF5}};
}

std::string version_text() {
    return fmt::format(
        "quantmill {}\n"
        "C++ compiler   {} ({})\n"
        "CUDA compiler  {}\n"
        "backends       {}\n"
        "MPI            {}\n"
        "BLAS           {}\n"
        "HDF5           {}\n",
        short_version(), QUANTMILL_CXX_COMPILER, QUANTMILL_BUILD_TYPE, QUANTMILL_CUDA_COMPILER,
        fmt::join(built_backends(), ", "), mpi_library(), QUANTMILL_BLAS, QUANTMILL_HDF5);
}

}  // namespace quantmill
