#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>

#include "pipeline/safetensors.h"

namespace quantmill::testing {

// Reads the header of a file with these bytes, through the same calls as a file on disk.
inline SafetensorsHeader read_header_of(const std::uint8_t* data, std::size_t size) {
    const int descriptor = ::memfd_create("safetensors", MFD_CLOEXEC);
    if (descriptor < 0) throw std::system_error(errno, std::generic_category(), "memfd_create");
    struct Closer {
        int descriptor;
        ~Closer() { ::close(descriptor); }
    } const closer{descriptor};
    if (::write(descriptor, data, size) != static_cast<ssize_t>(size)) {
        throw std::system_error(errno, std::generic_category(), "write");
    }
    return read_safetensors_header(InputFile("/proc/self/fd/" + std::to_string(descriptor)));
}

}  // namespace quantmill::testing
