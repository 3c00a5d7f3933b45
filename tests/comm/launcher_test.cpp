#include "comm/launcher.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <map>
#include <string>

#include "comm/control.h"

namespace quantmill {
namespace {

constexpr std::array kVariables{"OMPI_COMM_WORLD_SIZE",
                                "OMPI_COMM_WORLD_RANK",
                                "PMI_RANK",
                                "PMI_SIZE",
                                "PMIX_RANK",
                                "SLURM_PROCID",
                                "SLURM_STEP_ID",
                                "SLURM_NTASKS",
                                "SLURM_STEP_NUM_TASKS",
                                "QUANTMILL_TIMEOUT"};

// What launchers and batch systems put into a process's environment.
class Launcher : public testing::Test {
protected:
    void SetUp() override {
        for (const char* variable : kVariables) unsetenv(variable);
    }
    static void set(const std::map<std::string, std::string>& variables) {
        for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
    }
    static std::string refusal(bool whole_allocation) {
        try {
            make_control(false, whole_allocation);
        } catch (const BadInput& error) {
            return error.what();
        }
        return "";
    }
};

TEST_F(Launcher, PlainShell) {
    EXPECT_FALSE(under_launcher());
    EXPECT_EQ(refusal(true), "");
}

TEST_F(Launcher, OpenMpi) {
    set({{"OMPI_COMM_WORLD_SIZE", "4"}});
    EXPECT_TRUE(under_launcher());
    EXPECT_NE(refusal(false).find("OMPI_COMM_WORLD_SIZE=4"), std::string::npos);
    EXPECT_NE(refusal(false).find("srun --mpi=pmix"), std::string::npos);
}

TEST_F(Launcher, HydraOrPmi2) {
    set({{"PMI_RANK", "0"}, {"PMI_SIZE", "2"}});
    EXPECT_TRUE(under_launcher());
    EXPECT_NE(refusal(false).find("PMI_SIZE=2"), std::string::npos);
}

TEST_F(Launcher, Pmix) {
    set({{"PMIX_RANK", "3"}});
    EXPECT_TRUE(under_launcher());
}

TEST_F(Launcher, SlurmStep) {
    set({{"SLURM_PROCID", "1"},
         {"SLURM_STEP_ID", "0"},
         {"SLURM_STEP_NUM_TASKS", "4"},
         {"SLURM_NTASKS", "8"}});
    EXPECT_TRUE(under_launcher());
    EXPECT_TRUE(srun_without_process_interface());
    EXPECT_NE(refusal(false).find("SLURM_STEP_NUM_TASKS=4"), std::string::npos);
    set({{"PMIX_RANK", "1"}});
    EXPECT_TRUE(under_launcher());
    EXPECT_FALSE(srun_without_process_interface());
}

TEST_F(Launcher, BatchScriptIsNoLauncher) {
    set({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}});
    EXPECT_FALSE(under_launcher());
    EXPECT_FALSE(srun_without_process_interface());
    EXPECT_EQ(refusal(false), "");  // plan and inspect run alone there
    EXPECT_NE(refusal(true).find("SLURM_NTASKS=4"), std::string::npos);
    EXPECT_NE(refusal(true).find("--ntasks=1"), std::string::npos);
}

TEST_F(Launcher, InteractiveStepOfOneTask) {
    set({{"SLURM_PROCID", "0"},
         {"SLURM_STEP_ID", "0"},
         {"SLURM_STEP_NUM_TASKS", "1"},
         {"SLURM_NTASKS", "1"}});
    EXPECT_FALSE(under_launcher());
    EXPECT_EQ(refusal(true), "");
}

TEST_F(Launcher, MpirunMayUseLessThanTheAllocation) {
    set({{"OMPI_COMM_WORLD_SIZE", "2"}, {"SLURM_NTASKS", "8"}, {"SLURM_STEP_NUM_TASKS", "4"}});
    EXPECT_NO_THROW(require_launched_processes_in_world(2, true));
    EXPECT_THROW(require_launched_processes_in_world(1, true), BadInput);
}

// Of the variables of the launcher that started this process, not of one around it.
TEST_F(Launcher, RankBeforeMpi) {
    EXPECT_EQ(launched_rank(), 0);
    set({{"SLURM_PROCID", "3"}, {"SLURM_NTASKS", "4"}});
    EXPECT_EQ(launched_rank(), 0);  // a batch script
    set({{"SLURM_STEP_NUM_TASKS", "4"}});
    EXPECT_EQ(launched_rank(), 3);
    set({{"PMI_RANK", "2"}, {"PMI_SIZE", "4"}});
    EXPECT_EQ(launched_rank(), 2);
    set({{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}});
    EXPECT_EQ(launched_rank(), 1);
}

TEST_F(Launcher, Timeout) {
    EXPECT_EQ(wait_timeout(), 6 * 3600.0);
    set({{"QUANTMILL_TIMEOUT", "2.5"}});
    EXPECT_EQ(wait_timeout(), 2.5);
    for (const char* bad : {"0", "-1", "soon", "5s", "nan"}) {
        set({{"QUANTMILL_TIMEOUT", bad}});
        EXPECT_THROW(wait_timeout(), BadInput) << bad;
    }
}

TEST_F(Launcher, LoneControl) {
    const auto control = make_control(false);
    EXPECT_EQ(control->rank(), 0);
    EXPECT_EQ(control->size(), 1);
    EXPECT_EQ(control->local_size(), 1);
    EXPECT_EQ(control->host(), host_name());
    EXPECT_EQ(control->broadcast("word", 0), "word");
    EXPECT_EQ(control->all_gather("word"), std::vector<std::string>{"word"});
    EXPECT_EQ(control->all_sum({0.5, 2.0}), (std::vector{0.5, 2.0}));
    EXPECT_EQ(control->all_max({3}), (std::vector<std::int64_t>{3}));
}

TEST_F(Launcher, LoneAbortEndsWithTheCode) {
    const auto control = make_control(false);
    EXPECT_EXIT(control->abort(ExitCode::infrastructure), testing::ExitedWithCode(75), "");
}

TEST(MpiLibrary, IsNamedOnOneLine) {
    const std::string name = mpi_library();
    EXPECT_TRUE(name.find("MPI") != std::string::npos) << name;
    EXPECT_EQ(name.find_first_of("\n\t,"), std::string::npos) << name;
}

}  // namespace
}  // namespace quantmill
