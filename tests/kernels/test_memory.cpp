#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cpu/free_memory.h"
#include "tests/kernels/backend_test.h"

// AddressSanitizer would end the program instead of letting an allocation fail.
// NOLINTNEXTLINE(readability-identifier-naming): the sanitizer's name
extern "C" const char* __asan_default_options();
// NOLINTNEXTLINE(readability-identifier-naming)
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace quantmill::testing {
namespace {

class Memory : public BackendTest {};

TEST_P(Memory, TensorsOwnAndViewsRefer) {
    Tensor tensor = upload<float>({1, 2, 3, 4, 5, 6}, {3, 2});
    Tensor rows = backend().empty({2, 2}, DType::f32, "rows");
    backend().copy(tensor.view().rows(1, 3), rows);
    EXPECT_EQ(download<float>(rows), (std::vector<float>{3, 4, 5, 6}));
    backend().zero(tensor.view().rows(0, 1));
    const Tensor moved = std::move(tensor);
    EXPECT_EQ(download<float>(moved), (std::vector<float>{0, 0, 3, 4, 5, 6}));
    Tensor other = backend().empty({3}, DType::f32, "other");
    EXPECT_THROW(backend().copy(moved, other), InternalError);
}

TEST_P(Memory, NothingCanBeAllocated) {
    Tensor nothing = backend().empty({0, 5}, DType::f32, "nothing");
    backend().zero(nothing);
    EXPECT_TRUE(download<float>(nothing).empty());
}

TEST_P(Memory, TooMuchIsAnErrorThatNamesWhatItWasFor) {
    try {
        static_cast<void>(backend().empty({std::int64_t{1} << 55}, DType::f32, "the Hessian of block 7"));
        FAIL() << "2^57 bytes were allocated";
    } catch (const InfrastructureError& error) {
        EXPECT_NE(std::string(error.what()).find("the Hessian of block 7"), std::string::npos);
        EXPECT_NE(std::string(error.what()).find("144115188075855872"), std::string::npos);
    }
}

TEST_P(Memory, SomeIsFree) {
    EXPECT_GT(backend().free_memory(1), std::size_t{1} << 20);
    EXPECT_LT(backend().free_memory(1), std::size_t{1} << 50);
}

TEST_P(Memory, LanesCopyBesideTheOperations) {
    const std::vector<float> values = {1, 2, 3, 4, 5, 6};
    HostBuffer host = backend().host_buffer(values.size() * sizeof(float), "a test");
    std::copy(values.begin(), values.end(), reinterpret_cast<float*>(host.data()));
    Tensor tensor = backend().empty({6}, DType::f32, "a test");
    const auto lane = backend().make_copy_lane();
    lane->after(*backend().record());
    lane->upload(host.data(), tensor);
    backend().after(*lane->record());
    EXPECT_EQ(download<float>(tensor), values);

    backend().zero(tensor);
    lane->after(*backend().record());
    HostBuffer moved = std::move(host);
    lane->download(tensor, moved.data());
    const EventPtr done = lane->record();
    done->wait();
    EXPECT_EQ(reinterpret_cast<const float*>(moved.data())[5], 0.0F);
    EXPECT_GE(backend().record()->seconds_since(*done), 0.0);
}

TEST_P(Memory, PeakIsSeen) {
    const Tensor tensor = upload(std::vector<float>(1 << 20, 1.0F), {1 << 20});
    EXPECT_GE(backend().peak_memory(), std::size_t{4} << 20);
}

TEST_P(Memory, DescribesItself) {
    EXPECT_EQ(backend().name(), GetParam());
    EXPECT_FALSE(backend().description().empty());
}

INSTANTIATE_TEST_SUITE_P(Backends, Memory, ::testing::ValuesIn(built_backends()), backend_name);

TEST(MakeBackend, NamesTheRemedy) {
    EXPECT_THROW(static_cast<void>(make_backend("tpu", 0)), BadInput);
    if (built_backends().size() > 1) GTEST_SKIP() << "this binary was built with CUDA";
    EXPECT_EQ(make_backend("auto", 0)->name(), "cpu");
    try {
        static_cast<void>(make_backend("cuda", 0));
        FAIL() << "a backend that was not built was made";
    } catch (const BadInput& error) {
        EXPECT_NE(std::string(error.what()).find("--preset cuda"), std::string::npos);
    }
}

// A made-up /proc and /sys: how much is free is what the tightest limit leaves.
class FreeHostMemory : public ::testing::Test {
protected:
    FreeHostMemory() {
        std::string pattern = std::filesystem::temp_directory_path() / "quantmill-XXXXXX";
        root_ = mkdtemp(pattern.data());
        write("proc/meminfo", "MemTotal: 2000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n");
    }
    ~FreeHostMemory() override { std::filesystem::remove_all(root_); }

    void write(const std::string& file, const std::string& text) {
        std::filesystem::create_directories((root_ / file).parent_path());
        std::ofstream(root_ / file) << text;
    }

    std::filesystem::path root_;
};

TEST_F(FreeHostMemory, IsWhatTheMachineHas) {
    EXPECT_EQ(free_host_memory(root_), 1024000U);
    write("proc/self/cgroup", "0::/\n");
    write("sys/fs/cgroup/memory.max", "max\n");
    write("sys/fs/cgroup/memory.current", "5000\n");
    EXPECT_EQ(free_host_memory(root_), 1024000U);
}

TEST_F(FreeHostMemory, HonoursTheGroupAndItsAncestors) {
    write("proc/self/cgroup", "0::/jobs/step\n");
    write("sys/fs/cgroup/jobs/memory.max", "600000\n");
    write("sys/fs/cgroup/jobs/memory.current", "400000\n");
    write("sys/fs/cgroup/jobs/memory.stat", "anon 1\ninactive_file 100000\n");
    EXPECT_EQ(free_host_memory(root_), 300000U);
    write("sys/fs/cgroup/jobs/step/memory.max", "50000\n");
    write("sys/fs/cgroup/jobs/step/memory.current", "60000\n");
    EXPECT_EQ(free_host_memory(root_), 0U);
}

TEST_F(FreeHostMemory, HonoursVersionOneGroups) {
    write("proc/self/cgroup", "3:cpu,cpuacct:/x\n4:memory:/slurm\n0::/\n");
    write("sys/fs/cgroup/memory/slurm/memory.limit_in_bytes", "9223372036854771712\n");
    write("sys/fs/cgroup/memory/slurm/memory.usage_in_bytes", "1000\n");
    EXPECT_EQ(free_host_memory(root_), 1024000U);
    write("sys/fs/cgroup/memory/slurm/memory.limit_in_bytes", "700000\n");
    EXPECT_EQ(free_host_memory(root_), 699000U);
}

}  // namespace
}  // namespace quantmill::testing
