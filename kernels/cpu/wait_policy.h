#pragma once

namespace quantmill {

// Restarts the process once with OMP_WAIT_POLICY=passive, unless the user chose a policy. Threads that spin
// while they wait take the cores from those that compute wherever more threads run than there are cores
// (several ranks on a host, a shared node): five times the CPU time was seen. OpenMP reads the policy before
// main() begins, so only a restart can set it. Call it first thing in main().
void let_threads_sleep(char** argv);

}  // namespace quantmill
