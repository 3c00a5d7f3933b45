#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace quantmill {

// The one layer through which all files are read and written, so that faults can be injected and
// syncs recorded in one place.

// A file open for reading at any offset, from any thread. Never mapped: an I/O error must be an
// error, not a SIGBUS. Throws BadInput when the file is missing or unreadable.
class InputFile {
public:
    explicit InputFile(std::filesystem::path path);
    ~InputFile();
    InputFile(InputFile&& other) noexcept;
    InputFile& operator=(InputFile&& other) noexcept;

    const std::filesystem::path& path() const { return path_; }
    std::uint64_t size() const { return size_; }
    // Fills `destination` with bytes [offset, offset + bytes). Throws BadInput when the file ends
    // before, InfrastructureError on EIO.
    void read(std::uint64_t offset, void* destination, std::size_t bytes) const;

private:
    std::filesystem::path path_;
    int descriptor_ = -1;
    std::uint64_t size_ = 0;
};

std::string read_text(const std::filesystem::path& path);

// A file that appears under its name only when it is complete: written as NAME.partial, flushed,
// fsynced, renamed, the directory fsynced. Destroyed without finish() it removes the partial file.
// Throws InfrastructureError naming the file; a full disk says how many bytes were wanted and are
// free. A wrong path or a missing permission is BadInput.
class OutputFile {
public:
    explicit OutputFile(std::filesystem::path path);
    ~OutputFile();
    OutputFile(OutputFile&& other) noexcept;
    OutputFile& operator=(OutputFile&& other) noexcept;

    const std::filesystem::path& path() const { return path_; }
    void reserve(std::uint64_t bytes);  // a full disk shows now, not in hours
    void write(std::uint64_t offset, const void* source, std::size_t bytes);
    void finish();

private:
    std::filesystem::path path_;
    std::filesystem::path partial_;
    int descriptor_ = -1;
};

void write_text(const std::filesystem::path& path, const std::string& text);

// Gives a file that a library has written and closed as `partial` its name, synced as OutputFile does.
void publish_file(const std::filesystem::path& partial, const std::filesystem::path& path);

// Bytes that an unprivileged user may still write on the file system that holds `path` (or its
// nearest existing parent).
std::uint64_t free_disk(const std::filesystem::path& path);

// Lower-case hexadecimal SHA-256 of a file.
std::string sha256_of_file(const std::filesystem::path& path);

}  // namespace quantmill
