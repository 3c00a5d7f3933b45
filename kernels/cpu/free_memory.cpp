#include "kernels/cpu/free_memory.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "kernels/error.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;

// The number after `key` in a file of "key value" lines; also "key: value kB".
std::optional<std::uint64_t> read_field(const fs::path& file, std::string_view key) {
    std::ifstream stream(file);
    for (std::string line; std::getline(stream, line);) {
        std::istringstream words(line);
        std::string name;
        std::uint64_t value = 0;
        if (words >> name >> value && name == key) return value;
    }
    return std::nullopt;
}

// The number a control file holds; nothing when it is absent or says "max".
std::optional<std::uint64_t> read_number(const fs::path& file) {
    std::ifstream stream(file);
    std::uint64_t value = 0;
    if (stream >> value) return value;
    return std::nullopt;
}

// What one control group leaves; its inactive file pages can be dropped and do not count as used.
std::uint64_t group_headroom(const fs::path& group, const char* limit_name, const char* usage_name,
                             const char* reclaimable_name) {
    const auto limit = read_number(group / limit_name);
    const auto usage = read_number(group / usage_name);
    if (!limit || !usage) return std::numeric_limits<std::uint64_t>::max();
    const std::uint64_t reclaimable = read_field(group / "memory.stat", reclaimable_name).value_or(0);
    const std::uint64_t used = *usage - std::min(*usage, reclaimable);
    return *limit - std::min(*limit, used);
}

// The least headroom of a group and its ancestors; inside a container the group's own path may not be
// visible, but the mount point then is the container's group.
std::uint64_t hierarchy_headroom(const fs::path& mount, const std::string& group, const char* limit,
                                 const char* usage, const char* reclaimable) {
    std::uint64_t least = group_headroom(mount, limit, usage, reclaimable);
    fs::path path = mount;
    for (const fs::path& part : fs::path(group).relative_path()) {
        path /= part;
        least = std::min(least, group_headroom(path, limit, usage, reclaimable));
    }
    return least;
}

}  // namespace

std::size_t free_host_memory(const fs::path& root) {
    const auto available = read_field(root / "proc/meminfo", "MemAvailable:");
    if (!available) {
        throw InfrastructureError("{} has no MemAvailable", (root / "proc/meminfo").string());
    }
    std::uint64_t least = *available * 1024;

    const fs::path mount = root / "sys/fs/cgroup";
    std::ifstream groups(root / "proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {  // "0::/path" or "4:memory:/path"
        const auto first = line.find(':');
        const auto second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const std::string group = line.substr(second + 1);
        if (controllers.empty()) {
            least = std::min(
                least, hierarchy_headroom(mount, group, "memory.max", "memory.current", "inactive_file"));
        } else if (controllers == "memory") {
            least = std::min(least, hierarchy_headroom(mount / "memory", group, "memory.limit_in_bytes",
                                                       "memory.usage_in_bytes", "total_inactive_file"));
        }
    }
    return least;
}

std::size_t peak_host_memory() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}

}  // namespace quantmill
