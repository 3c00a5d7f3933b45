#include "pipeline/checkpoint_writer.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <mutex>
#include <nlohmann/json.hpp>
#include <utility>

#include "kernels/error.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

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

    Shard(const fs::path& path, std::uint64_t bytes) : file(path), bytes(bytes) {}

    // Nobody else may have removed or replaced it since it was finished.
    void require_in_place() const {
        std::error_code error;
        const auto found = fs::file_size(file.path(), error);
        if (error) {
            throw InfrastructureError("{} was written and is gone ({}): does another program write there?",
                                      file.path().string(), error.message());
        }
        if (found != bytes) {
            throw InfrastructureError(
                "{} has {} bytes, but {} were written: does another program write there?",
                file.path().string(), found, bytes);
        }
    }

    std::mutex mutex;  // of the members below; writes themselves run beside each other
    OutputFile file;
    std::uint64_t bytes;
    std::map<std::string, Progress> tensors;
    std::size_t missing = 0;
};

CheckpointWriter::CheckpointWriter(fs::path directory, const std::vector<OutputShard>& shards,
                                   const std::vector<std::size_t>& owned) {
    for (const std::size_t index : owned) {
        const OutputShard& planned = shards.at(index);
        auto shard = std::make_unique<Shard>(directory / planned.file_name, planned.bytes);
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
    if (missing.empty()) {
        for (const auto& shard : shards_) shard->require_in_place();
        return;
    }
    constexpr std::size_t kShown = 10;
    const std::size_t count = missing.size();
    missing.resize(std::min(count, kShown));
    throw InternalError("{} output tensors were never written: {}{}", count, fmt::join(missing, ", "),
                        count > kShown ? ", …" : "");
}

}  // namespace quantmill
