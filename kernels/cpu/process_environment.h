#pragma once

namespace quantmill {

// Restarts the process once where libraries that read their settings before main() begins would be slow with
// the defaults; what the user set stays. Call it first thing in main().
// OMP_WAIT_POLICY=passive: threads that spin while they wait take the cores from those that compute wherever
// more threads run than there are cores (ranks of one host, a shared node): five times the CPU time was seen.
// OPENBLAS_CORETYPE: an OpenBLAS older than the processor falls back to kernels of 2004, four times slower.
void settle_process_environment(char** argv);

}  // namespace quantmill
