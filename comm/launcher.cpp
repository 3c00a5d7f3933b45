#include "comm/launcher.h"

#include <unistd.h>

#include <array>
#include <charconv>
#include <cstdlib>
#include <cstring>

#include "comm/control.h"

namespace quantmill {

namespace {

std::optional<int> environment_number(const char* variable) {
    const char* text = std::getenv(variable);
    if (text == nullptr) return std::nullopt;
    int number = 0;
    const char* end = text + std::strlen(text);
    const auto [parsed, error] = std::from_chars(text, end, number);
    if (error != std::errc() || parsed != end) return std::nullopt;
    return number;
}

bool is_set(const char* variable) { return std::getenv(variable) != nullptr; }

bool has_process_interface() {
    return is_set("OMPI_COMM_WORLD_SIZE") ||              // Open MPI's mpirun
           (is_set("PMI_RANK") && is_set("PMI_SIZE")) ||  // MPICH's, Intel's; srun --mpi=pmi2
           is_set("PMIX_RANK");                           // srun --mpi=pmix, prterun
}

}  // namespace

std::string host_name() {
    std::array<char, 256> name{};
    if (gethostname(name.data(), name.size() - 1) != 0) return "unknown host";
    return name.data();
}

double wait_timeout() {
    constexpr double kDefault = 6 * 3600.0;
    const char* text = std::getenv("QUANTMILL_TIMEOUT");
    if (text == nullptr || *text == '\0') return kDefault;
    char* end = nullptr;
    const double seconds = std::strtod(text, &end);
    if (*end != '\0' || !(seconds > 0)) {
        throw BadInput("QUANTMILL_TIMEOUT is '{}'; it must be a positive number of seconds", text);
    }
    return seconds;
}

bool srun_without_process_interface() {
    // A batch script, and a shell in an allocation, are not "under srun" although they see SLURM_NTASKS and
    // SLURM_PROCID: only a step has SLURM_STEP_NUM_TASKS, and the step of an interactive shell has one task.
    return !has_process_interface() && is_set("SLURM_PROCID") &&
           environment_number("SLURM_STEP_NUM_TASKS").value_or(1) > 1;
}

bool under_launcher() { return has_process_interface() || srun_without_process_interface(); }

std::optional<LaunchedProcesses> launched_processes(bool whole_allocation) {
    // Nearest launcher first: mpirun may start fewer ranks than the allocation has tasks.
    for (const char* variable :
         {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"}) {
        if (!whole_allocation && std::strcmp(variable, "SLURM_NTASKS") == 0) break;
        if (const auto count = environment_number(variable)) return {{*count, variable}};
    }
    return std::nullopt;
}

int launched_rank() {
    if (!under_launcher()) return 0;
    for (const char* variable : {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"}) {
        if (const auto rank = environment_number(variable)) return *rank;
    }
    return 0;
}

void require_launched_processes_in_world(int world_size, bool whole_allocation) {
    const auto launched = launched_processes(whole_allocation);
    if (!launched || launched->count <= world_size) return;
    throw BadInput(
        "{}={}, but this process sees only {} rank(s): the launcher started processes that do not "
        "know of each other. Start them with `srun --mpi=pmix` (`srun --mpi=list` shows what your "
        "cluster has) or with the mpirun of the MPI that this program was built with ({}); for a "
        "single process ask for --ntasks=1 or unset {}",
        launched->variable, launched->count, world_size, mpi_library(), launched->variable);
}

}  // namespace quantmill
