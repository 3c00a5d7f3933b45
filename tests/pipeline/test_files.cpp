#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <utility>
#include <vector>

#include "pipeline/files.h"
#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/temporary_directory.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using testing::contents;
using testing::expect_error;
using testing::TemporaryDirectory;

std::size_t open_descriptors() {
    const fs::directory_iterator all("/proc/self/fd");
    return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

std::vector<std::string> names_in(const fs::path& directory) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(directory)) {
        names.push_back(entry.path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
}

TEST(InputFile, ReadsAnyRange) {
    const TemporaryDirectory directory;
    const InputFile file(directory.write("a", "0123456789"));
    EXPECT_EQ(file.size(), 10U);
    std::string got(4, '?');
    file.read(3, got.data(), 4);
    EXPECT_EQ(got, "3456");
    file.read(6, got.data(), 4);
    EXPECT_EQ(got, "6789");
    file.read(10, got.data(), 0);
    EXPECT_EQ(got, "6789");
}

TEST(InputFile, SaysThatTheFileEnded) {
    const TemporaryDirectory directory;
    const InputFile file(directory.write("short.bin", "0123456789"));
    std::string got(4, '?');
    expect_error<BadInput>([&] { file.read(7, got.data(), 4); }, {"short.bin", "truncated", "1 bytes"});
    expect_error<BadInput>([&] { file.read(1U << 20U, got.data(), 1); }, {"short.bin"});
}

TEST(InputFile, FileThatShrinksAfterOpening) {
    const TemporaryDirectory directory;
    const fs::path path = directory.write("shrinks", "0123456789");
    const InputFile file(path);
    fs::resize_file(path, 5);
    std::string got(10, '?');
    expect_error<BadInput>([&] { file.read(0, got.data(), 10); }, {"shrinks", "byte 5", "truncated"});
}

TEST(InputFile, MissingFileAndDirectory) {
    const TemporaryDirectory directory;
    expect_error<BadInput>([&] { InputFile(directory / "none"); }, {"none", std::strerror(ENOENT)});
    expect_error<BadInput>([&] { InputFile(directory.path()); },
                           {directory.path().string(), "not a regular file"});
    expect_error<BadInput>([&] { InputFile("/dev/null"); }, {"/dev/null", "not a regular file"});
}

TEST(InputFile, AnInputOutputErrorIsAnInfrastructureError) {
    // The kernel answers EIO for an address of this process that is not mapped.
    const InputFile file("/proc/self/mem");
    char byte = 0;
    expect_error<InfrastructureError>([&] { file.read(0, &byte, 1); },
                                      {"/proc/self/mem", std::strerror(EIO)});
}

TEST(InputFile, MovesAndClosesItsDescriptor) {
    const TemporaryDirectory directory;
    const fs::path path = directory.write("a", "hello");
    const std::size_t before = open_descriptors();
    {
        InputFile first(path);
        InputFile second(std::move(first));
        InputFile third(directory.write("b", "world"));
        third = std::move(second);
        char byte = 0;
        third.read(1, &byte, 1);
        EXPECT_EQ(byte, 'e');
        EXPECT_EQ(third.size(), 5U);
        EXPECT_THROW(InputFile("/proc/self"), BadInput);
    }
    EXPECT_EQ(open_descriptors(), before);
}

// Address space whose every mebibyte is the same memory: a destination of any size at no cost.
class FoldedMemory {
public:
    static constexpr std::size_t kFold = std::size_t{1} << 20U;

    explicit FoldedMemory(std::size_t folds) : size_(folds * kFold) {
        const int descriptor = ::memfd_create("fold", MFD_CLOEXEC);
        EXPECT_EQ(::ftruncate(descriptor, kFold), 0);
        data_ = static_cast<char*>(
            ::mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        for (std::size_t i = 0; i < folds; ++i) {
            EXPECT_NE(::mmap(data_ + i * kFold, kFold, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                             descriptor, 0),
                      MAP_FAILED);
        }
        ::close(descriptor);
    }
    ~FoldedMemory() { ::munmap(data_, size_); }
    FoldedMemory(const FoldedMemory&) = delete;
    FoldedMemory& operator=(const FoldedMemory&) = delete;
    char* data() const { return data_; }
    std::size_t size() const { return size_; }

private:
    std::size_t size_;
    char* data_;
};

// One call of the kernel moves at most 2 GiB minus a page.
TEST(InputFile, ReadsMoreThanTwoGibibytes) {
    const FoldedMemory memory(2050);
    // Holes of a file in memory cost nothing either.
    const int descriptor = ::memfd_create("sparse", MFD_CLOEXEC);
    ASSERT_EQ(::ftruncate(descriptor, static_cast<off_t>(memory.size())), 0);
    const auto last_fold = static_cast<off_t>(memory.size() - FoldedMemory::kFold);
    ASSERT_EQ(::pwrite(descriptor, "last", 4, last_fold), 4);
    ASSERT_EQ(::pwrite(descriptor, "end", 3, static_cast<off_t>(memory.size() - 3)), 3);
    const std::string path = "/proc/self/fd/" + std::to_string(descriptor);
    std::memset(memory.data(), '?', FoldedMemory::kFold);
    InputFile(path).read(0, memory.data(), memory.size());
    EXPECT_EQ(std::string(memory.data(), 6), std::string("last\0\0", 6));
    EXPECT_EQ(std::string(memory.data() + FoldedMemory::kFold - 3, 3), "end");
    ::close(descriptor);
}

TEST(ReadText, WholeFile) {
    const TemporaryDirectory directory;
    const std::string text("a\0b\n", 4);
    EXPECT_EQ(read_text(directory.write("t", text)), text);
    EXPECT_EQ(read_text(directory.write("empty", "")), "");
    expect_error<BadInput>([&] { read_text(directory / "none"); }, {"none"});
}

TEST(OutputFile, AppearsOnlyWhenFinished) {
    const TemporaryDirectory directory;
    const fs::path path = directory / "out.bin";
    OutputFile file(path);
    file.write(5, "56789", 5);
    file.write(0, "01234", 5);
    EXPECT_EQ(names_in(directory.path()), std::vector<std::string>{"out.bin.partial"});
    file.finish();
    EXPECT_EQ(names_in(directory.path()), std::vector<std::string>{"out.bin"});
    EXPECT_EQ(contents(path), "0123456789");
    EXPECT_THROW(file.finish(), InternalError);
}

TEST(OutputFile, KeepsTheOldFileUntilTheNewOneIsComplete) {
    const TemporaryDirectory directory;
    const fs::path path = directory.write("out", "old");
    {
        OutputFile abandoned(path);
        abandoned.write(0, "new", 3);
        EXPECT_EQ(contents(path), "old");
    }
    EXPECT_EQ(names_in(directory.path()), std::vector<std::string>{"out"});
    EXPECT_EQ(contents(path), "old");
    write_text(path, "newer");
    EXPECT_EQ(contents(path), "newer");
}

TEST(OutputFile, ForgetsWhatAnInterruptedRunLeft) {
    const TemporaryDirectory directory;
    directory.write("out.partial", "longer than what comes now");
    write_text(directory / "out", "short");
    EXPECT_EQ(contents(directory / "out"), "short");
}

TEST(OutputFile, ReservesSpace) {
    const TemporaryDirectory directory;
    OutputFile file(directory / "out");
    file.reserve(0);
    file.reserve(1U << 20U);
    struct stat status{};
    ASSERT_EQ(::stat((directory / "out.partial").c_str(), &status), 0);
    EXPECT_EQ(status.st_size, 1 << 20);
    EXPECT_GE(status.st_blocks * 512, 1 << 20);
}

TEST(OutputFile, MovesAndClosesItsDescriptor) {
    const TemporaryDirectory directory;
    const std::size_t before = open_descriptors();
    {
        OutputFile first(directory / "a");
        first.write(0, "x", 1);
        OutputFile second(std::move(first));
        OutputFile third(directory / "b");
        third = std::move(second);
        third.finish();
        EXPECT_EQ(third.path(), directory / "a");
    }
    EXPECT_EQ(open_descriptors(), before);
    EXPECT_EQ(names_in(directory.path()), std::vector<std::string>{"a"});
}

TEST(OutputFile, DirectoryThatIsMissing) {
    const TemporaryDirectory directory;
    expect_error<BadInput>([&] { OutputFile(directory / "no/out"); }, {"no/out", std::strerror(ENOENT)});
}

TEST(OutputFile, TargetThatCannotBeReplaced) {
    const TemporaryDirectory directory;
    directory.write("out/file", "");
    OutputFile file(directory / "out");
    expect_error<BadInput>([&] { file.finish(); }, {"out", std::strerror(EISDIR)});
    EXPECT_EQ(names_in(directory.path()), std::vector<std::string>{"out"});
}

TEST(OutputFile, FileBeyondTheLimitOfTheProcess) {
    const TemporaryDirectory directory;
    struct rlimit saved{};
    ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &saved), 0);
    auto* const handler = ::signal(SIGXFSZ, SIG_IGN);
    const struct rlimit small = {4096, saved.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
    const std::string data(8192, 'x');
    OutputFile file(directory / "out");
    // The first 4096 bytes are written: a short write that must be followed by another.
    expect_error<InfrastructureError>([&] { file.write(0, data.data(), data.size()); },
                                      {"out", std::strerror(EFBIG)});
    EXPECT_EQ(fs::file_size(directory / "out.partial"), 4096U);
    ::setrlimit(RLIMIT_FSIZE, &saved);
    ::signal(SIGXFSZ, handler);
}

// A file system of one MiB, which only root may mount.
class SmallDisk : public ::testing::Test {
protected:
    void SetUp() override {
        if (::mount("tmpfs", directory_.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
            GTEST_SKIP() << "cannot mount a small tmpfs here: " << std::strerror(errno);
        }
        mounted_ = true;
    }
    void TearDown() override {
        if (mounted_) ::umount(directory_.path().c_str());
    }
    TemporaryDirectory directory_;
    bool mounted_ = false;
};

TEST_F(SmallDisk, ReservingTooMuchNamesFileBytesAndRemedy) {
    OutputFile file(directory_ / "big.safetensors");
    const std::uint64_t free = free_disk(directory_.path());
    EXPECT_LE(free, 1U << 20U);
    expect_error<InfrastructureError>(
        [&] { file.reserve(2U << 20U); },
        {"big.safetensors", std::strerror(ENOSPC), "2097152 bytes were wanted", "another output"});
    // What the failed reservation took is given back with the file.
    {
        const OutputFile gone = std::move(file);
    }
    EXPECT_EQ(free_disk(directory_.path()), free);
    EXPECT_TRUE(fs::is_empty(directory_.path()));
}

TEST_F(SmallDisk, WritingTooMuch) {
    const std::string data(2U << 20U, 'x');
    {
        OutputFile file(directory_ / "big");
        expect_error<InfrastructureError>([&] { file.write(0, data.data(), data.size()); },
                                          {"big", std::strerror(ENOSPC), "wanted", "0 are free"});
    }
    EXPECT_TRUE(fs::is_empty(directory_.path()));
    expect_error<InfrastructureError>([&] { write_text(directory_ / "t", data); }, {"t:"});
    EXPECT_TRUE(fs::is_empty(directory_.path()));
}

TEST(FreeDisk, AsksTheNearestExistingParent) {
    const TemporaryDirectory directory;
    EXPECT_GT(free_disk(directory.path()), 0U);
    EXPECT_GT(free_disk(directory / "not/yet/there"), 0U);
    EXPECT_GT(free_disk("relative/and/missing"), 0U);
}

// Vectors of FIPS 180-4, as published by NIST.
TEST(Sha256, KnownAnswers) {
    const TemporaryDirectory directory;
    EXPECT_EQ(sha256_of_file(directory.write("empty", "")),
              "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    EXPECT_EQ(sha256_of_file(directory.write("abc", "abc")),
              "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    EXPECT_EQ(sha256_of_file(directory.write("3 MB", std::string(3'000'000, 'a'))),
              sha256_of_file(directory.write("again", std::string(3'000'000, 'a'))));
    EXPECT_EQ(sha256_of_file(directory.write("million", std::string(1'000'000, 'a'))),
              "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    expect_error<BadInput>([&] { sha256_of_file(directory / "none"); }, {"none"});
}

}  // namespace
}  // namespace quantmill
