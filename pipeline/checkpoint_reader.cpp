#include "pipeline/checkpoint_reader.h"

#include <fmt/ranges.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <utility>

#include "kernels/error.h"
#include "kernels/half.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr const char* kSingleName = "model.safetensors";

json parse_json_object(const fs::path& path) {
    json parsed;
    try {
        parsed = json::parse(read_text(path));
    } catch (const json::exception& error) {
        throw BadInput("{} is not valid JSON: {}", path.string(), error.what());
    }
    if (!parsed.is_object()) throw BadInput("{} is not a JSON object", path.string());
    return parsed;
}

json read_config(const fs::path& directory) {
    std::error_code ignored;
    if (!fs::is_directory(directory, ignored)) {
        throw BadInput("{} is no directory: a Hugging Face checkpoint directory is expected",
                       directory.string());
    }
    const fs::path path = directory / "config.json";
    if (!fs::exists(path, ignored)) {
        throw BadInput("{} has no config.json: a Hugging Face checkpoint directory is expected",
                       directory.string());
    }
    return parse_json_object(path);
}

// A file of the index must lie in the checkpoint directory, whatever the index says.
void require_inside(const std::string& name, const fs::path& index) {
    const fs::path path(name);
    const bool climbs = std::find(path.begin(), path.end(), "..") != path.end();
    if (name.empty() || path.is_absolute() || climbs) {
        throw BadInput("{}: '{}' is not the name of a file in the checkpoint directory", index.string(),
                       name);
    }
}

struct Index {
    std::map<std::string, std::string> file_of;  // tensor -> file name
    json total_size;                             // null when the index has none
};

Index read_index(const fs::path& path) {
    const json parsed = parse_json_object(path);
    const auto map = parsed.find("weight_map");
    if (map == parsed.end() || !map->is_object()) {
        throw BadInput("{}: weight_map is missing or not an object", path.string());
    }
    Index index;
    for (const auto& [tensor, file] : map->items()) {
        if (!file.is_string()) {
            throw BadInput("{}: weight_map entry '{}' is not a file name", path.string(), tensor);
        }
        index.file_of.emplace(tensor, file.get<std::string>());
        require_inside(file.get<std::string>(), path);
    }
    if (index.file_of.empty()) throw BadInput("{}: weight_map is empty", path.string());
    const auto metadata = parsed.find("metadata");
    if (metadata != parsed.end() && metadata->is_object()) {
        const auto total = metadata->find("total_size");
        if (total != metadata->end() && total->is_number()) index.total_size = *total;
    }
    return index;
}

// Names of the weight files, and the index when there is one.
std::pair<std::vector<std::string>, std::optional<Index>> find_weights(const fs::path& directory) {
    const fs::path index_path = directory / kIndexName;
    const bool single = fs::exists(directory / kSingleName);
    if (fs::exists(index_path)) {
        Index index = read_index(index_path);
        std::set<std::string> names;
        for (const auto& [tensor, file] : index.file_of) names.insert(file);
        if (single && !names.contains(kSingleName)) {
            throw BadInput("{} has both {} and a {} of other files: remove the one that is not meant",
                           directory.string(), kSingleName, kIndexName);
        }
        return {{names.begin(), names.end()}, std::move(index)};
    }
    if (single) return {{kSingleName}, std::nullopt};
    throw BadInput(
        "{} has neither {} nor {}: checkpoints in other formats (.bin, .pth, .gguf) must be "
        "converted "
        "to safetensors first, a directory without an index is an unfinished download or output",
        directory.string(), kIndexName, kSingleName);
}

void require_same_tensors(const Index& index, const fs::path& directory,
                          const std::map<std::string, std::size_t>& file_index,
                          const std::vector<std::string>& files) {
    for (const auto& [tensor, file] : index.file_of) {
        const auto found = file_index.find(tensor);
        if (found == file_index.end() || files.at(found->second) != file) {
            throw BadInput("{}: tensor '{}' is not in {}, where {} says it is", directory.string(), tensor,
                           file, kIndexName);
        }
    }
    for (const auto& [tensor, file] : file_index) {
        if (!index.file_of.contains(tensor)) {
            throw BadInput("{}: tensor '{}' of {} is missing from {}", directory.string(), tensor,
                           files.at(file), kIndexName);
        }
    }
}

// Position of the first NaN or infinity: a float whose exponent bits are all ones.
template <class Bits>
std::optional<std::uint64_t> first_not_finite(const void* data, std::uint64_t count, Bits exponent) {
    constexpr std::size_t kBlock = 4096;
    std::array<Bits, kBlock> block;
    for (std::uint64_t begin = 0; begin < count; begin += kBlock) {
        const std::size_t size = std::min<std::uint64_t>(kBlock, count - begin);
        std::memcpy(block.data(), static_cast<const char*>(data) + begin * sizeof(Bits), size * sizeof(Bits));
        unsigned bad = 0;  // without an early exit the loop vectorises
        for (std::size_t i = 0; i < size; ++i) {
            bad |= static_cast<unsigned>((block[i] & exponent) == exponent);
        }
        if (bad == 0) continue;
        for (std::size_t i = 0; i < size; ++i) {
            if ((block[i] & exponent) == exponent) return begin + i;
        }
    }
    return std::nullopt;
}

std::optional<std::uint64_t> first_not_finite(DType dtype, const void* data, std::uint64_t count) {
    switch (dtype) {
        case DType::f64: return first_not_finite<std::uint64_t>(data, count, 0x7FF0000000000000U);
        case DType::f32: return first_not_finite<std::uint32_t>(data, count, 0x7F800000U);
        case DType::f16: return first_not_finite<std::uint16_t>(data, count, 0x7C00U);
        case DType::bf16: return first_not_finite<std::uint16_t>(data, count, 0x7F80U);
        default: return std::nullopt;
    }
}

template <class T>
double element(const void* data, std::uint64_t position) {
    T value;
    std::memcpy(&value, static_cast<const char*>(data) + position * sizeof(T), sizeof(T));
    if constexpr (std::is_floating_point_v<T>) {
        return value;
    } else {
        return to_float(value);
    }
}

double element(DType dtype, const void* data, std::uint64_t position) {
    switch (dtype) {
        case DType::f64: return element<double>(data, position);
        case DType::f32: return element<float>(data, position);
        case DType::f16: return element<Half>(data, position);
        default: return element<BFloat16>(data, position);
    }
}

// "row 3, column 5" of a matrix; in general the index along each axis.
std::string describe_position(const std::vector<std::int64_t>& shape, std::uint64_t position) {
    std::vector<std::uint64_t> index(shape.size());
    for (std::size_t axis = shape.size(); axis-- > 0;) {
        const auto extent = static_cast<std::uint64_t>(shape[axis]);
        index[axis] = position % extent;
        position /= extent;
    }
    if (index.size() == 2) return fmt::format("row {}, column {}", index[0], index[1]);
    return fmt::format("index [{}]", fmt::join(index, ", "));
}

}  // namespace

CheckpointReader::CheckpointReader(fs::path directory)
    : directory_(std::move(directory)), config_(read_config(directory_)) {
    const auto [names, index] = find_weights(directory_);
    for (const std::string& name : names) {
        const fs::path path = directory_ / name;
        if (index && !fs::exists(path)) {
            throw BadInput("{}: {} names {}, which is not there: the checkpoint is incomplete",
                           directory_.string(), kIndexName, name);
        }
        files_.push_back(std::make_shared<InputFile>(path));
        for (StoredTensor& tensor : read_safetensors_header(*files_.back()).tensors) {
            const auto [other, is_new] = file_index_.emplace(tensor.name, files_.size() - 1);
            if (!is_new) {
                throw BadInput("{}: tensor '{}' is both in {} and in {}", directory_.string(), tensor.name,
                               names.at(other->second), name);
            }
            const std::string key = tensor.name;
            tensors_.emplace(key, std::move(tensor));
        }
    }
    if (!index) return;
    require_same_tensors(*index, directory_, file_index_, names);
    if (!index->total_size.is_null() && index->total_size != json(total_bytes())) {
        spdlog::warn("{}: {} gives a total_size of {} bytes, the tensors have {}; going on",
                     directory_.string(), kIndexName, index->total_size.dump(), total_bytes());
    }
}

std::uint64_t CheckpointReader::total_bytes() const {
    std::uint64_t bytes = 0;
    for (const auto& [name, tensor] : tensors_) bytes += tensor.bytes();
    return bytes;
}

std::vector<fs::path> CheckpointReader::files() const {
    std::vector<fs::path> paths;
    for (const auto& file : files_) paths.push_back(file->path());
    return paths;
}

const StoredTensor& CheckpointReader::find(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
        throw BadInput("{} has no tensor '{}', which its config.json asks for", directory_.string(), name);
    }
    return found->second;
}

const StoredTensor& CheckpointReader::find(const std::string& name,
                                           const std::vector<std::int64_t>& shape) const {
    const StoredTensor& tensor = find(name);
    if (tensor.shape != shape) {
        throw BadInput("{}: tensor '{}' has the shape [{}], its config.json asks for [{}]",
                       file_of(name).string(), name, fmt::join(tensor.shape, ", "), fmt::join(shape, ", "));
    }
    return tensor;
}

const fs::path& CheckpointReader::file_of(const std::string& name) const {
    find(name);
    return files_.at(file_index_.at(name))->path();
}

void CheckpointReader::read(const std::string& name, std::uint64_t offset, void* destination,
                            std::size_t bytes) const {
    const StoredTensor& tensor = find(name);
    if (offset > tensor.bytes() || bytes > tensor.bytes() - offset) {
        throw InternalError("bytes [{}, {} + {}) of tensor '{}', which has {}", offset, offset, bytes, name,
                            tensor.bytes());
    }
    files_.at(file_index_.at(name))->read(tensor.begin + offset, destination, bytes);
}

void CheckpointReader::read(const std::string& name, void* destination) const {
    read(name, 0, destination, find(name).bytes());
}

void require_finite(const StoredTensor& tensor, const void* data, const std::string& file) {
    const auto dtype = dtype_from_safetensors(tensor.dtype);
    if (!dtype) return;
    require_finite(tensor, 0, data, static_cast<std::size_t>(tensor.count()) * size_of(*dtype), file);
}

void require_finite(const StoredTensor& tensor, std::uint64_t offset, const void* data, std::size_t bytes,
                    const std::string& file) {
    const auto dtype = dtype_from_safetensors(tensor.dtype);
    if (!dtype) return;
    const auto position = first_not_finite(*dtype, data, bytes / size_of(*dtype));
    if (!position) return;
    throw BadInput("{}: tensor '{}' holds {} at {}: the checkpoint is damaged", file, tensor.name,
                   element(*dtype, data, *position),
                   describe_position(tensor.shape, offset / size_of(*dtype) + *position));
}

void read_finite(const CheckpointReader& reader, const std::string& name, const PieceSink& sink) {
    const StoredTensor& tensor = reader.find(name);
    const std::string file = reader.file_of(name).string();
    std::vector<std::byte> piece;
    for (std::uint64_t offset = 0; offset == 0 || offset < tensor.bytes(); offset += kReadPiece) {
        piece.resize(std::min<std::uint64_t>(kReadPiece, tensor.bytes() - offset));
        reader.read(name, offset, piece.data(), piece.size());
        require_finite(tensor, offset, piece.data(), piece.size(), file);
        sink(offset, piece.data(), piece.size());
    }
}

}  // namespace quantmill
