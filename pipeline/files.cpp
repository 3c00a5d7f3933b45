#include "pipeline/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/error.h"
#include "pipeline/sha256.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kLargestCall = std::size_t{1} << 30U;  // Linux moves at most 2 GiB a call

std::string reason(int error) { return std::strerror(error); }

// What the user can mend (a wrong path, missing permission) against what the machine did.
bool is_users_fault(int error) {
    return error == ENOENT || error == EACCES || error == EPERM || error == ENOTDIR || error == EROFS ||
           error == ELOOP || error == ENAMETOOLONG || error == EISDIR;
}

// The file system's answer, or nothing when it cannot be asked.
std::optional<std::uint64_t> available_bytes(const fs::path& existing) {
    struct statvfs status{};
    while (::statvfs(existing.c_str(), &status) != 0) {
        if (errno != EINTR) return std::nullopt;
    }
    return static_cast<std::uint64_t>(status.f_bavail) * status.f_frsize;
}

fs::path directory_of(const fs::path& path) {
    return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

[[noreturn]] void throw_disk_full(const fs::path& path, std::uint64_t wanted, int error) {
    const auto free = available_bytes(directory_of(path));
    throw InfrastructureError(
        "{}: {}: {} bytes were wanted and {} are free on that file system; free some space or "
        "choose "
        "another output directory",
        path.string(), reason(error), wanted, free ? std::to_string(*free) : "an unknown number");
}

[[noreturn]] void throw_write_error(const fs::path& path, const char* what, int error,
                                    std::uint64_t wanted = 0) {
    if (error == ENOSPC || error == EDQUOT) throw_disk_full(path, wanted, error);
    if (is_users_fault(error)) throw BadInput("cannot {} {}: {}", what, path.string(), reason(error));
    throw InfrastructureError("cannot {} {}: {}", what, path.string(), reason(error));
}

int open_retrying(const fs::path& path, int flags) {
    int descriptor = -1;
    do {
        descriptor = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
    } while (descriptor < 0 && errno == EINTR);
    return descriptor;
}

int fsync_retrying(int descriptor) {
    int status = 0;
    do {
        status = ::fsync(descriptor);
    } while (status != 0 && errno == EINTR);
    return status;
}

// A rename survives a power cut only when its directory was synced too.
void sync_directory(const fs::path& directory) {
    const int descriptor = open_retrying(directory, O_RDONLY | O_DIRECTORY);
    if (descriptor < 0) throw_write_error(directory, "open the directory", errno);
    const int status = fsync_retrying(descriptor);
    const int error = errno;
    ::close(descriptor);
    // Some network file systems cannot sync a directory and say so with EINVAL.
    if (status != 0 && error != EINVAL) throw_write_error(directory, "sync the directory", error);
}

}  // namespace

InputFile::InputFile(fs::path path) : path_(std::move(path)) {
    descriptor_ = open_retrying(path_, O_RDONLY);
    if (descriptor_ < 0) {
        const int error = errno;
        if (is_users_fault(error)) throw BadInput("cannot read {}: {}", path_.string(), reason(error));
        throw InfrastructureError("cannot read {}: {}", path_.string(), reason(error));
    }
    struct stat status{};
    if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
        ::close(std::exchange(descriptor_, -1));
        throw BadInput("cannot read {}: not a regular file", path_.string());
    }
    size_ = static_cast<std::uint64_t>(status.st_size);
}

InputFile::~InputFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

InputFile::InputFile(InputFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      size_(std::exchange(other.size_, 0)) {}

InputFile& InputFile::operator=(InputFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(descriptor_, other.descriptor_);
    std::swap(size_, other.size_);
    return *this;
}

void InputFile::read(std::uint64_t offset, void* destination, std::size_t bytes) const {
    auto* out = static_cast<char*>(destination);
    while (bytes > 0) {
        const ssize_t got =
            ::pread(descriptor_, out, std::min(bytes, kLargestCall), static_cast<off_t>(offset));
        if (got < 0) {
            if (errno == EINTR) continue;
            throw InfrastructureError("reading {} bytes at {} of {}: {}", bytes, offset, path_.string(),
                                      reason(errno));
        }
        if (got == 0) {
            throw BadInput("{} ends at byte {}, {} bytes short: the file is truncated", path_.string(),
                           offset, bytes);
        }
        out += got;
        offset += static_cast<std::uint64_t>(got);
        bytes -= static_cast<std::size_t>(got);
    }
}

std::string read_text(const fs::path& path) {
    const InputFile file(path);
    std::string text(file.size(), '\0');
    file.read(0, text.data(), text.size());
    return text;
}

OutputFile::OutputFile(fs::path path) : path_(std::move(path)), partial_(path_) {
    partial_ += ".partial";
    descriptor_ = open_retrying(partial_, O_WRONLY | O_CREAT | O_TRUNC);
    if (descriptor_ < 0) throw_write_error(partial_, "create", errno);
}

OutputFile::~OutputFile() {
    if (descriptor_ < 0) return;
    ::close(descriptor_);
    ::unlink(partial_.c_str());
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      partial_(std::move(other.partial_)),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

OutputFile& OutputFile::operator=(OutputFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(partial_, other.partial_);
    std::swap(descriptor_, other.descriptor_);
    return *this;
}

void OutputFile::reserve(std::uint64_t bytes) {
    if (bytes == 0) return;
    int status = 0;
    do {
        // Not posix_fallocate: where the file system cannot, glibc would write to every block.
        status = ::fallocate(descriptor_, 0, 0, static_cast<off_t>(bytes));
    } while (status != 0 && errno == EINTR);
    if (status == 0) return;
    const int error = errno;
    if (error != EOPNOTSUPP && error != EINVAL && error != ENOSYS) {
        throw_write_error(path_, "reserve space for", error, bytes);
    }
    const auto free = available_bytes(directory_of(path_));
    if (free && *free < bytes) throw_disk_full(path_, bytes, ENOSPC);
}

void OutputFile::write(std::uint64_t offset, const void* source, std::size_t bytes) {
    const auto* in = static_cast<const char*>(source);
    while (bytes > 0) {
        const ssize_t put =
            ::pwrite(descriptor_, in, std::min(bytes, kLargestCall), static_cast<off_t>(offset));
        if (put < 0) {
            if (errno == EINTR) continue;
            throw_write_error(path_, "write", errno, bytes);
        }
        in += put;
        offset += static_cast<std::uint64_t>(put);
        bytes -= static_cast<std::size_t>(put);
    }
}

void OutputFile::finish() {
    if (descriptor_ < 0) throw InternalError("{} is finished already", path_.string());
    struct stat status{};
    const std::uint64_t size =
        ::fstat(descriptor_, &status) == 0 ? static_cast<std::uint64_t>(status.st_size) : 0;
    if (fsync_retrying(descriptor_) != 0) throw_write_error(path_, "sync", errno, size);
    const int descriptor = std::exchange(descriptor_, -1);
    // Linux has closed the file even after EINTR; other errors (NFS) mean that data was lost.
    if (::close(descriptor) != 0 && errno != EINTR) {
        const int error = errno;
        ::unlink(partial_.c_str());
        throw_write_error(path_, "close", error, size);
    }
    if (::rename(partial_.c_str(), path_.c_str()) != 0) {
        const int error = errno;
        ::unlink(partial_.c_str());
        throw_write_error(path_, "rename the partial file to", error, size);
    }
    sync_directory(directory_of(path_));
}

void write_text(const fs::path& path, const std::string& text) {
    OutputFile file(path);
    file.write(0, text.data(), text.size());
    file.finish();
}

std::uint64_t free_disk(const fs::path& path) {
    fs::path existing = fs::absolute(path);
    std::error_code ignored;
    while (!fs::exists(existing, ignored) && existing.has_relative_path()) {
        existing = existing.parent_path();
    }
    const auto bytes = available_bytes(existing);
    if (!bytes) {
        throw InfrastructureError("cannot ask the file system of {} for its free space: {}",
                                  existing.string(), reason(errno));
    }
    return *bytes;
}

void publish_file(const fs::path& partial, const fs::path& path) {
    const int descriptor = open_retrying(partial, O_RDONLY);
    if (descriptor < 0) throw_write_error(partial, "open", errno);
    const int status = fsync_retrying(descriptor);
    const int error = errno;
    ::close(descriptor);
    if (status != 0) throw_write_error(partial, "sync", error);
    if (::rename(partial.c_str(), path.c_str()) != 0) {
        throw_write_error(path, "rename the partial file to", errno);
    }
    sync_directory(directory_of(path));
}

std::string sha256_of_file(const fs::path& path) {
    const InputFile file(path);
    Sha256 sha;
    std::vector<unsigned char> buffer(std::size_t{1} << 20U);
    for (std::uint64_t offset = 0; offset < file.size();) {
        const std::size_t bytes = std::min<std::uint64_t>(buffer.size(), file.size() - offset);
        file.read(offset, buffer.data(), bytes);
        sha.add(buffer.data(), bytes);
        offset += bytes;
    }
    return sha.finish();
}

}  // namespace quantmill
