#include "pipeline/checkpoint_writer.h"

#include <fcntl.h>
#include <fmt/ranges.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <string_view>
#include <utility>

#include "kernels/error.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr const char* kMarker = ".quantmill";
constexpr std::array kOurConfigs = {"config.json", "quantize_config.json", "quantization_config.json"};

std::uint64_t data_bytes(const StoredTensor& tensor) {
    const auto bits = safetensors_bits(tensor.dtype);
    if (!bits) throw InternalError("tensor '{}' has the unknown dtype {}", tensor.name, tensor.dtype);
    return static_cast<std::uint64_t>(tensor.count()) * *bits / 8;
}

// No less than a tensor's entry takes in the header: escapes, all digits of the numbers.
std::uint64_t entry_bytes(const StoredTensor& tensor) {
    return 6 * tensor.name.size() + 21 * (tensor.shape.size() + 2) + 64;
}

std::vector<OutputShard> split(const std::vector<StoredTensor>& tensors, std::uint64_t max_shard_size) {
    constexpr std::uint64_t kFixedBytes = 64;  // length, metadata, padding
    std::vector<OutputShard> shards;
    for (const StoredTensor& tensor : tensors) {
        const std::uint64_t bytes = data_bytes(tensor) + entry_bytes(tensor);
        if (shards.empty() || shards.back().bytes + bytes > max_shard_size) {
            shards.emplace_back().bytes = kFixedBytes;
        }
        shards.back().bytes += bytes;
        shards.back().tensors.push_back(tensor);
    }
    return shards;
}

bool is_shard_name(const std::string& name) {
    static const std::regex pattern(R"(model(-\d+-of-\d+)?\.safetensors(\.partial)?)");
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

// Only files that a run writes anew: whatever else the user keeps there stays.
void remove_leftovers(const fs::path& directory) {
    // Without its index a checkpoint is unfinished, so it must go before the first shard does.
    fs::remove(directory / kIndexName);
    std::vector<fs::path> leftovers;
    for (const fs::directory_entry& entry : fs::directory_iterator(directory)) {
        const std::string name = entry.path().filename().string();
        const bool partial = name.ends_with(".partial") && (name == std::string(kIndexName) + ".partial" ||
                                                            is_our_config(entry.path().stem().string()));
        if (is_shard_name(name) || is_our_config(name) || partial) leftovers.push_back(entry.path());
    }
    for (const fs::path& path : leftovers) fs::remove(path);
}

void require_apart(const fs::path& directory, const fs::path& source) {
    const fs::path output = fs::weakly_canonical(directory);
    const fs::path model = fs::weakly_canonical(source);
    const auto difference = std::mismatch(model.begin(), model.end(), output.begin(), output.end());
    if (difference.first != model.end()) return;
    throw BadInput("output directory {} is or lies in the model directory {}: choose another one",
                   directory.string(), source.string());
}

void require_usable(const fs::path& directory, bool overwrite) {
    if (!fs::is_directory(directory)) {
        throw BadInput("output directory {} exists and is no directory", directory.string());
    }
    if (overwrite || fs::is_empty(directory)) return;
    if (!is_ours(directory)) {
        throw BadInput(
            "output directory {} is not empty and was not written by quantmill: choose another "
            "one, "
            "or give --overwrite to put the checkpoint there all the same",
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

// `parents`: the directories above, resolved, so that a link to one of them ends.
void copy_tree(const fs::path& from, const fs::path& to, bool top, std::set<fs::path> parents) {
    if (!parents.insert(fs::canonical(from)).second) return;
    for (const fs::directory_entry& entry : fs::directory_iterator(from)) {
        const std::string name = entry.path().filename().string();
        if (entry.is_directory()) {  // follows links
            if (!name.starts_with(".")) copy_tree(entry.path(), to / name, false, parents);
        } else if (is_weights_or_archive(name) || (top && is_written_by_us(name))) {
            continue;
        } else if (entry.is_regular_file()) {
            fs::create_directories(to);
            copy_contents(entry.path(), to / name);
        } else {
            spdlog::warn("{} is not copied: it is neither a file nor a link to one", entry.path().string());
        }
    }
}

}  // namespace

std::vector<OutputShard> layout_shards(const std::vector<StoredTensor>& tensors,
                                       std::uint64_t max_shard_size) {
    std::vector<OutputShard> shards = split(tensors, max_shard_size);
    for (std::size_t i = 0; i < shards.size(); ++i) {
        OutputShard& shard = shards[i];
        shard.file_name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
        // Wider elements first keeps every tensor aligned to its element; loaders that view the
        // bytes in place need it.
        std::stable_sort(shard.tensors.begin(), shard.tensors.end(),
                         [](const StoredTensor& a, const StoredTensor& b) {
                             return safetensors_bits(a.dtype) > safetensors_bits(b.dtype);
                         });
        shard.header = make_safetensors_header(shard.tensors, {{"format", "pt"}});
        shard.bytes = shard.tensors.back().end;
    }
    return shards;
}

std::string make_index_json(const std::vector<OutputShard>& shards) {
    std::uint64_t total = 0;
    json weight_map = json::object();
    for (const OutputShard& shard : shards) {
        for (const StoredTensor& tensor : shard.tensors) {
            total += tensor.bytes();
            if (weight_map.contains(tensor.name)) {
                throw InternalError("tensor '{}' is in two output shards", tensor.name);
            }
            weight_map[tensor.name] = shard.file_name;
        }
    }
    const json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
    return index.dump(2) + "\n";
}

struct CheckpointWriter::Shard {
    struct Progress {
        std::uint64_t begin, end;   // in the file
        std::uint64_t claimed = 0;  // bytes handed to write_piece
        bool done = false;
    };

    explicit Shard(const fs::path& path) : file(path) {}

    std::mutex mutex;  // of the members below; writes themselves run beside each other
    OutputFile file;
    std::map<std::string, Progress> tensors;
    std::size_t missing = 0;
};

CheckpointWriter::CheckpointWriter(fs::path directory, const std::vector<OutputShard>& shards,
                                   const std::vector<std::size_t>& owned) {
    for (const std::size_t index : owned) {
        const OutputShard& planned = shards.at(index);
        auto shard = std::make_unique<Shard>(directory / planned.file_name);
        shard->file.reserve(planned.bytes);
        shard->file.write(0, planned.header.data(), planned.header.size());
        for (const StoredTensor& tensor : planned.tensors) {
            shard->tensors.emplace(tensor.name, Shard::Progress{tensor.begin, tensor.end});
            if (!shard_of_.emplace(tensor.name, shard.get()).second) {
                throw InternalError("tensor '{}' is in two output shards", tensor.name);
            }
        }
        shard->missing = shard->tensors.size();
        shards_.push_back(std::move(shard));
    }
}

CheckpointWriter::~CheckpointWriter() = default;

bool CheckpointWriter::owns(const std::string& tensor) const { return shard_of_.contains(tensor); }

void CheckpointWriter::write(const std::string& tensor, const void* data, std::size_t bytes) {
    const auto found = shard_of_.find(tensor);
    if (found != shard_of_.end()) {
        const auto& progress = found->second->tensors.at(tensor);
        if (progress.end - progress.begin != bytes) {
            throw InternalError("tensor '{}' has {} bytes, {} were to be written", tensor,
                                progress.end - progress.begin, bytes);
        }
    }
    write_piece(tensor, 0, data, bytes);
}

void CheckpointWriter::write_piece(const std::string& tensor, std::uint64_t offset, const void* data,
                                   std::size_t bytes) {
    const auto found = shard_of_.find(tensor);
    if (found == shard_of_.end()) {
        throw InternalError("tensor '{}' is in no shard that this rank owns", tensor);
    }
    Shard& shard = *found->second;
    Shard::Progress& progress = shard.tensors.at(tensor);
    const std::uint64_t size = progress.end - progress.begin;
    {
        const std::lock_guard lock(shard.mutex);
        if (progress.done || offset != progress.claimed || bytes > size - offset) {
            throw InternalError("tensor '{}': bytes {} + {} were to be written after {} of {}", tensor,
                                offset, bytes, progress.claimed, size);
        }
        progress.claimed += bytes;
    }
    shard.file.write(progress.begin + offset, data, bytes);
    if (offset + bytes < size) return;
    const std::lock_guard lock(shard.mutex);
    progress.done = true;
    if (--shard.missing == 0) shard.file.finish();
}

void CheckpointWriter::finish() {
    std::vector<std::string> missing;
    for (const auto& [tensor, shard] : shard_of_) {
        const std::lock_guard lock(shard->mutex);
        if (!shard->tensors.at(tensor).done) missing.push_back(tensor);
    }
    if (missing.empty()) return;
    constexpr std::size_t kShown = 10;
    const std::size_t count = missing.size();
    missing.resize(std::min(count, kShown));
    throw InternalError("{} output tensors were never written: {}{}", count, fmt::join(missing, ", "),
                        count > kShown ? ", …" : "");
}

void prepare_output_directory(const fs::path& directory, bool overwrite, const fs::path& source) {
    try {
        if (!source.empty()) require_apart(directory, source);
        if (fs::exists(directory)) {
            require_usable(directory, overwrite);
            if (::faccessat(AT_FDCWD, directory.c_str(), W_OK | X_OK, AT_EACCESS) != 0) {
                throw BadInput("output directory {} is not writable: {}", directory.string(),
                               std::strerror(errno));
            }
        }
        fs::create_directories(directory / kMarker);
        remove_leftovers(directory);
    } catch (const fs::filesystem_error& error) {
        throw BadInput("cannot prepare the output directory {}: {}", directory.string(),
                       error.code().message());
    }
}

void copy_companion_files(const fs::path& source, const fs::path& directory) {
    try {
        copy_tree(source, directory, true, {});
    } catch (const fs::filesystem_error& error) {
        throw BadInput("cannot copy the files beside the weights of {}: {}", source.string(), error.what());
    }
}

}  // namespace quantmill
