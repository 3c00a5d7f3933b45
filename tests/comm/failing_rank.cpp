// Three ranks of which rank 1 fails: "throw CODE" reports and aborts while the others wait for it,
// "unwind CODE" lets the exception pass the Control first, "late CODE" lets the others wait too long.
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>

#include "comm/control.h"
#include "comm/mpi_control.h"

namespace {

using namespace quantmill;

void fail(Control& control, const std::string& how, ExitCode code) {
    if (control.rank() == 1 && how == "late") std::this_thread::sleep_for(std::chrono::seconds(30));
    if (control.rank() == 1) throw Error(code, "rank 1 does not like its input");
    control.broadcast("word", 1);
}

}  // namespace

int main(int, char** argv) {
    const std::string how = argv[1];
    const auto code = static_cast<ExitCode>(std::stoi(argv[2]));
    const auto control = make_mpi_control({.timeout = how == "late" ? 1.0 : 30.0});
    try {
        if (how == "unwind") {
            const auto inner = make_mpi_control({});
            fail(*inner, how, code);
        } else {
            fail(*control, how, code);
        }
    } catch (const Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        control->abort(error.code());
    }
    return 0;
}
