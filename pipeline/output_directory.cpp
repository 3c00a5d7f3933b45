#include "pipeline/output_directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/error.h"
#include "pipeline/files.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr const char* kMarker = ".quantmill";
constexpr const char* kRecord = "files.json";
constexpr std::string_view kPartial = ".partial";
constexpr std::array kOurConfigs = {"config.json", "quantize_config.json", "quantization_config.json"};

bool is_shard_name(const std::string& name) {
    static const std::regex pattern(R"(model(-\d+-of-\d+)?\.safetensors)");
    return std::regex_match(name, pattern);
}

bool is_our_config(const std::string& name) {
    return std::find(kOurConfigs.begin(), kOurConfigs.end(), name) != kOurConfigs.end();
}

// Written by this program: it left its marker, or says so in the configuration of a finished
// checkpoint.
bool is_ours(const fs::path& directory) {
    if (fs::is_directory(directory / kMarker)) return true;
    const fs::path config = directory / "quantize_config.json";
    if (!fs::is_regular_file(config)) return false;
    const json parsed = json::parse(read_text(config), nullptr, false);
    const json::json_pointer quantizer("/meta/quantizer");
    return parsed.is_object() && parsed.contains(quantizer) &&
           parsed.at(quantizer).dump().find("quantmill") != std::string::npos;
}

std::string without_partial(const std::string& name) {
    return name.ends_with(kPartial) ? name.substr(0, name.size() - kPartial.size()) : name;
}

// Weights of a checkpoint, their index and its configurations, partial ones too.
bool is_checkpoint_file(const std::string& name) {
    const std::string whole = without_partial(name);
    return is_shard_name(whole) || whole == kIndexName || is_our_config(whole);
}

bool stays_below(const fs::path& path) {
    return path.is_relative() && std::find(path.begin(), path.end(), "..") == path.end();
}

// What the last run there wrote or meant to write; nothing when it left no record.
std::optional<std::set<std::string>> recorded_files(const fs::path& directory) {
    const fs::path path = directory / kMarker / kRecord;
    if (!fs::is_regular_file(path)) return std::nullopt;
    const json parsed = json::parse(read_text(path), nullptr, false);
    std::set<std::string> names;
    for (const json& name : parsed) {
        if (name.is_string() && stays_below(name.get<std::string>())) names.insert(name);
    }
    return names;
}

struct Leftovers {
    std::vector<std::string> ours;     // relative to the directory
    std::vector<std::string> foreign;  // files of a checkpoint that we did not write
};

Leftovers find_leftovers(const fs::path& directory) {
    Leftovers found;
    const bool ours = is_ours(directory);
    const auto record = recorded_files(directory);
    for (const fs::directory_entry& entry : fs::directory_iterator(directory)) {
        const std::string name = entry.path().filename().string();
        if (!is_checkpoint_file(name)) continue;
        const bool mine = record ? record->contains(without_partial(name)) : ours;
        (mine ? found.ours : found.foreign).push_back(name);
    }
    std::sort(found.foreign.begin(), found.foreign.end());
    for (const std::string& name : record.value_or(std::set<std::string>{})) {
        if (is_checkpoint_file(name)) continue;
        for (const std::string& file : {name, name + std::string(kPartial)}) {
            if (fs::is_regular_file(fs::symlink_status(directory / file))) found.ours.push_back(file);
        }
    }
    return found;
}

// Whatever else the user keeps there stays.
void remove_leftovers(const fs::path& directory) {
    const Leftovers leftovers = find_leftovers(directory);
    // Without its index a checkpoint is unfinished, so it must go before the first shard does.
    fs::remove(directory / kIndexName);
    for (const std::string& name : leftovers.ours) {
        fs::remove(directory / name);
        std::error_code not_empty;
        for (fs::path below = fs::path(name).parent_path(); !below.empty(); below = below.parent_path()) {
            if (!fs::remove(directory / below, not_empty)) break;
        }
    }
}

void require_apart(const fs::path& directory, const fs::path& source) {
    const fs::path output = fs::weakly_canonical(directory);
    const fs::path model = fs::weakly_canonical(source);
    const auto difference = std::mismatch(model.begin(), model.end(), output.begin(), output.end());
    if (difference.first != model.end()) return;
    throw BadInput("output directory {} is or lies in the model directory {}: choose another one",
                   directory.string(), source.string());
}

// The directory, or what is there of the path to it.
fs::path nearest_existing(const fs::path& directory) {
    fs::path existing = fs::absolute(directory);
    while (!fs::exists(fs::symlink_status(existing)) && existing.has_relative_path()) {
        existing = existing.parent_path();
    }
    return existing;
}

void require_writable(const fs::path& directory) {
    const fs::path existing = nearest_existing(directory);
    if (!fs::is_directory(existing)) {
        throw BadInput("output directory {}: {} is no directory: choose another one", directory.string(),
                       existing.string());
    }
    if (::faccessat(AT_FDCWD, existing.c_str(), W_OK | X_OK, AT_EACCESS) != 0) {
        const int error = errno;
        throw BadInput("output directory {}: {} is not writable: {}", directory.string(), existing.string(),
                       std::strerror(error));
    }
}

// The directory exists.
void require_usable(const fs::path& directory, bool overwrite) {
    if (const auto foreign = find_leftovers(directory).foreign; !foreign.empty()) {
        throw BadInput(
            "output directory {} holds a model that quantmill did not write ({}): choose another one; not "
            "even --overwrite replaces it",
            directory.string(), foreign.front());
    }
    if (overwrite || fs::is_empty(directory)) return;
    if (!is_ours(directory)) {
        throw BadInput(
            "output directory {} is not empty and was not written by quantmill: choose another one, or give "
            "--overwrite to put the checkpoint there all the same",
            directory.string());
    }
    if (fs::exists(directory / kIndexName)) {
        throw BadInput(
            "output directory {} already holds a finished checkpoint: choose another one, or give "
            "--overwrite to replace it",
            directory.string());
    }
}

// Weights, their indexes and archives, wherever they lie.
bool is_weights_or_archive(const std::string& name) {
    static constexpr std::array kEndings = {
        ".safetensors", ".bin", ".pt", ".pth", ".ckpt",    ".gguf",       ".ggml",      ".onnx", ".onnx_data",
        ".msgpack",     ".h5",  ".ot", ".npz", ".zip",     ".tar",        ".tgz",       ".gz",   ".bz2",
        ".xz",          ".zst", ".7z", ".rar", ".partial", ".incomplete", ".index.json"};
    std::string lower = name;
    std::transform(lower.begin(), lower.end(), lower.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return lower.starts_with("consolidated.") ||
           std::any_of(kEndings.begin(), kEndings.end(),
                       [&](const char* ending) { return lower.ends_with(ending); });
}

// Files at the top of a checkpoint that a run writes itself.
bool is_written_by_us(const std::string& name) {
    static const std::regex recipe(R"(recipe\.ya?ml)");
    return is_our_config(name) || name == "README.md" || std::regex_match(name, recipe);
}

void copy_contents(const fs::path& from, const fs::path& to) {
    const InputFile in(from);
    OutputFile out(to);
    std::vector<char> buffer(std::size_t{4} << 20U);
    for (std::uint64_t offset = 0; offset < in.size();) {
        const std::size_t bytes = std::min<std::uint64_t>(buffer.size(), in.size() - offset);
        in.read(offset, buffer.data(), bytes);
        out.write(offset, buffer.data(), bytes);
        offset += bytes;
    }
    out.finish();
}

// The paths, relative to `source`, of what is copied from `directory` below it. `parents`: the
// directories above, resolved, so that a link to one of them ends.
void list_companions(const fs::path& source, const fs::path& directory, std::set<fs::path> parents,
                     std::vector<fs::path>& files) {
    const fs::path from = source / directory;
    if (!parents.insert(fs::canonical(from)).second) return;
    for (const fs::directory_entry& entry : fs::directory_iterator(from)) {
        const std::string name = entry.path().filename().string();
        if (entry.is_directory()) {  // follows links
            if (!name.starts_with(".")) list_companions(source, directory / name, parents, files);
        } else if (!is_weights_or_archive(name) && !(directory.empty() && is_written_by_us(name))) {
            files.push_back(directory / name);
        }
    }
}

std::vector<fs::path> companions_of(const fs::path& source) {
    try {
        std::vector<fs::path> files;
        list_companions(source, {}, {}, files);
        return files;
    } catch (const fs::filesystem_error& error) {
        throw BadInput("cannot list the files beside the weights of {}: {}", source.string(), error.what());
    }
}

// Lets the next run know what it may remove. Call it when what the last one left is gone: a file that is
// there now is the user's, also when this run replaces it.
void write_record(const fs::path& directory, const fs::path& source, const std::vector<std::string>& files) {
    std::set<std::string> names(files.begin(), files.end());
    if (!source.empty()) {
        for (const fs::path& file : companions_of(source)) names.insert(file.string());
    }
    std::erase_if(names, [&](const std::string& name) { return fs::exists(directory / name); });
    write_text(directory / kMarker / kRecord, json(names).dump(1) + "\n");
}

// What the disk gets back when the file is removed, which is not its size where that was reserved.
std::uint64_t bytes_on_disk(const fs::path& path) {
    struct stat status{};
    if (::lstat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode) || status.st_nlink > 1) return 0;
    return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

// Says in the lock who holds it.
void name_owner(int descriptor, const fs::path& path) {
    std::array<char, 256> host{};
    if (::gethostname(host.data(), host.size() - 1) != 0) host[0] = '?';
    const std::string owner = fmt::format("process {} on {}", ::getpid(), host.data());
    if (::ftruncate(descriptor, 0) != 0 ||
        ::pwrite(descriptor, owner.data(), owner.size(), 0) != static_cast<ssize_t>(owner.size())) {
        spdlog::warn("cannot write the owner into {}: {}", path.string(), std::strerror(errno));
    }
}

}  // namespace

OutputLock::OutputLock(const fs::path& directory) {
    const fs::path path = directory / kMarker / "lock";
    descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (descriptor_ < 0) throw BadInput("cannot open {}: {}", path.string(), std::strerror(errno));
    int status = 0;
    do {
        status = ::flock(descriptor_, LOCK_EX | LOCK_NB);
    } while (status != 0 && errno == EINTR);
    const int error = errno;
    if (status == 0) {
        name_owner(descriptor_, path);
    } else if (error == EWOULDBLOCK) {
        ::close(std::exchange(descriptor_, -1));
        const std::string owner = read_text(path);
        throw BadInput(
            "output directory {}: another run writes there ({}): wait for it or end it, or choose another "
            "directory",
            directory.string(), owner.empty() ? "which has just begun" : owner);
    } else {
        spdlog::warn("{} cannot be locked ({}): see to it that no other run writes there", path.string(),
                     std::strerror(error));
    }
}

OutputLock::~OutputLock() {
    if (descriptor_ < 0) return;
    // Its name stays: who removed it could remove the lock of a run that has just opened it.
    if (::ftruncate(descriptor_, 0) != 0) spdlog::debug("cannot empty the lock: {}", std::strerror(errno));
    ::close(descriptor_);
}

void check_output_directory(const fs::path& directory, bool overwrite, const fs::path& source) {
    try {
        if (!source.empty()) require_apart(directory, source);
        require_writable(directory);
        if (fs::exists(directory)) require_usable(directory, overwrite);
    } catch (const fs::filesystem_error& error) {
        throw BadInput("cannot look into the output directory {}: {}", directory.string(),
                       error.code().message());
    }
}

std::unique_ptr<OutputLock> prepare_output_directory(const fs::path& directory, bool overwrite,
                                                     const fs::path& source,
                                                     const std::vector<std::string>& files) {
    check_output_directory(directory, overwrite, source);
    try {
        fs::create_directories(directory / kMarker);
        auto lock = std::make_unique<OutputLock>(directory);
        // Another run may have finished since; now none can.
        check_output_directory(directory, overwrite, source);
        remove_leftovers(directory);
        write_record(directory, source, files);
        return lock;
    } catch (const fs::filesystem_error& error) {
        throw BadInput("cannot prepare the output directory {}: {}", directory.string(),
                       error.code().message());
    }
}

std::uint64_t reclaimed_bytes(const fs::path& directory) {
    std::uint64_t bytes = 0;
    if (!fs::is_directory(directory)) return bytes;
    for (const std::string& name : find_leftovers(directory).ours) bytes += bytes_on_disk(directory / name);
    return bytes;
}

std::uint64_t companion_bytes(const fs::path& source) {
    std::uint64_t bytes = 0;
    for (const fs::path& file : companions_of(source)) {
        std::error_code no_file;  // such as a link to nothing
        const auto size = fs::file_size(source / file, no_file);
        if (!no_file) bytes += size;
    }
    return bytes;
}

void copy_companion_files(const fs::path& source, const fs::path& directory) {
    for (const fs::path& file : companions_of(source)) {
        if (!fs::is_regular_file(source / file)) {
            spdlog::warn("{} is not copied: it is neither a file nor a link to one",
                         (source / file).string());
            continue;
        }
        try {
            fs::create_directories((directory / file).parent_path());
        } catch (const fs::filesystem_error& error) {
            throw BadInput("cannot copy {}: {}", (source / file).string(), error.what());
        }
        copy_contents(source / file, directory / file);
    }
}

}  // namespace quantmill
