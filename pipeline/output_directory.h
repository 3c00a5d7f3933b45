#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace quantmill {

// A run's claim to its output directory: a locked file in .quantmill/ that names the process. The
// system unlocks it when the process ends, however it ends.
class OutputLock {
public:
    // Throws BadInput naming the owner when another process holds it; where the file system has no
    // locks, warns and goes on.
    explicit OutputLock(const std::filesystem::path& directory);
    ~OutputLock();
    OutputLock(const OutputLock&) = delete;
    OutputLock& operator=(const OutputLock&) = delete;

private:
    int descriptor_ = -1;
};

// Throws BadInput when a run could not write there: the directory cannot be made or written, is or
// lies in `source`, or holds weights or configurations that we did not write; without `overwrite`
// also when it holds a finished checkpoint of ours or anything that is not ours. Changes nothing.
void check_output_directory(const std::filesystem::path& directory, bool overwrite,
                            const std::filesystem::path& source = {});

// Makes the same checks, creates the directory with our marker (.quantmill/) in it and removes what
// an earlier run left, by the record that it made. The new record names `files` (relative paths) and
// the companions in `source`. No other run can claim the directory while the result lives; throws
// BadInput when one has.
std::unique_ptr<OutputLock> prepare_output_directory(const std::filesystem::path& directory, bool overwrite,
                                                     const std::filesystem::path& source = {},
                                                     const std::vector<std::string>& files = {});

// Bytes of disk that prepare_output_directory gives back by removing what an earlier run left.
std::uint64_t reclaimed_bytes(const std::filesystem::path& directory);

// Bytes that copy_companion_files will write.
std::uint64_t companion_bytes(const std::filesystem::path& source);

// Copies everything of the source directory but weights, indexes, archives and the configs that we
// write (checkpoint-formats: "by exclusion"); follows symbolic links.
void copy_companion_files(const std::filesystem::path& source, const std::filesystem::path& directory);

}  // namespace quantmill
