#pragma once

#include <cstddef>
#include <filesystem>

namespace quantmill {

// Bytes that this process may still allocate: MemAvailable of the machine, less when a control group
// (v1 or v2) of this process allows less. Reads proc/ and sys/fs/cgroup/ under root.
std::size_t free_host_memory(const std::filesystem::path& root = "/");

// Bytes of memory that this process held at most so far.
std::size_t peak_host_memory();

}  // namespace quantmill
