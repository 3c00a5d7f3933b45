#include "kernels/cpu/wait_policy.h"

#include <unistd.h>

#include <cstdlib>

namespace quantmill {

void let_threads_sleep(char** argv) {
    constexpr const char* kPolicy = "OMP_WAIT_POLICY";
    if (std::getenv(kPolicy) != nullptr || setenv(kPolicy, "passive", 0) != 0) return;
    execv("/proc/self/exe", argv);  // where this fails, the program is only slower
}

}  // namespace quantmill
