#include "kernels/cpu/process_environment.h"

#include <cblas.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <set>
#include <string>
#include <system_error>

namespace quantmill {
namespace {

// The kernels that OpenBLAS should use instead of those it chose; null: its choice is right.
const char* better_blas_kernels() {
#ifdef __x86_64__
    // What OpenBLAS 0.3 falls back to where it does not know the processor's model.
    static const std::set<std::string> kFallbacks{"Prescott", "Nehalem", "Sandybridge"};
    if (!kFallbacks.contains(openblas_get_corename())) return nullptr;
    if (__builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0) return "SkylakeX";
    if (__builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0) return "Haswell";
#endif
    return nullptr;
}

// Whether the variable was not set and is now.
bool set_default(const char* variable, const char* value) {
    return value != nullptr && std::getenv(variable) == nullptr && setenv(variable, value, 0) == 0;
}

}  // namespace

void settle_process_environment(char** argv) {
    const bool policy = set_default("OMP_WAIT_POLICY", "passive");
    const bool kernels = set_default("OPENBLAS_CORETYPE", better_blas_kernels());
    if (!policy && !kernels) return;
    std::error_code error;  // where this fails, the program is only slower
    const auto program =
        std::filesystem::read_symlink("/proc/self/exe", error);  // a link would name the process
    if (!error) execv(program.c_str(), argv);
}

}  // namespace quantmill
