#include "tests/mpi_main.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <string>

namespace {

quantmill::Control* control = nullptr;
std::uint64_t seed = 0;

// On ranks other than 0, which speak only when something failed.
class FailurePrinter : public testing::EmptyTestEventListener {
    void OnTestPartResult(const testing::TestPartResult& result) override {
        if (!result.failed()) return;
        std::fprintf(stderr, "rank %d: %s:%d: %s\n", control->rank(),
                     result.file_name() == nullptr ? "?" : result.file_name(), result.line_number(),
                     result.message());
    }
};

void choose_seed() {
    const char* given = std::getenv("QUANTMILL_TEST_SEED");
    const std::string chosen = given != nullptr ? given : std::to_string(std::random_device()());
    seed = std::stoull(control->broadcast(chosen, 0));
    if (control->rank() == 0) std::printf("QUANTMILL_TEST_SEED=%s\n", chosen.c_str());
}

}  // namespace

namespace quantmill {
Control& test_control() { return *control; }
std::uint64_t test_seed() { return seed; }
}  // namespace quantmill

int main(int argc, char** argv) {
    testing::InitGoogleTest(&argc, argv);
    const auto owner = quantmill::make_control(true);
    control = owner.get();
    try {
        choose_seed();
        if (control->rank() != 0) {
            auto& listeners = testing::UnitTest::GetInstance()->listeners();
            delete listeners.Release(listeners.default_result_printer());
            listeners.Append(new FailurePrinter);
        }
        const bool failed = RUN_ALL_TESTS() != 0;
        const bool any_failed = control->all_max({failed ? 1 : 0}).at(0) != 0;
        if (any_failed && !failed && control->rank() == 0) std::puts("Another rank failed.");
        return any_failed ? 1 : 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        control->abort(quantmill::ExitCode::internal);
    }
}
