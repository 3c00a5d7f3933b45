#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/safetensors.h"

namespace quantmill {

// A Hugging Face checkpoint directory: config.json and one or many safetensors files. Opening reads
// headers only and checks index against headers: every file there, every tensor where the index
// says, none twice. Reading is thread-safe.
class CheckpointReader {
public:
    explicit CheckpointReader(std::filesystem::path directory);

    const std::filesystem::path& directory() const { return directory_; }
    const nlohmann::json& config() const { return config_; }
    const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }
    std::uint64_t total_bytes() const;  // of all tensors
    std::vector<std::filesystem::path> files() const;

    bool contains(const std::string& name) const { return tensors_.contains(name); }
    // Throws BadInput naming the tensor and the directory when it is missing.
    const StoredTensor& find(const std::string& name) const;
    // Throws BadInput when the stored shape differs; a helpful message shows both.
    const StoredTensor& find(const std::string& name, const std::vector<std::int64_t>& shape) const;
    const std::filesystem::path& file_of(const std::string& name) const;

    // Bytes [offset, offset + bytes) of a tensor.
    void read(const std::string& name, std::uint64_t offset, void* destination, std::size_t bytes) const;
    void read(const std::string& name, void* destination) const;

private:
    std::filesystem::path directory_;
    nlohmann::json config_;
    std::vector<std::shared_ptr<InputFile>> files_;
    std::map<std::string, StoredTensor> tensors_;
    std::map<std::string, std::size_t> file_index_;
};

// Throws BadInput naming tensor, row and value when float data (f32, f16, bf16 or f64) holds NaN or
// an infinity; other dtypes pass.
void require_finite(const StoredTensor& tensor, const void* data, const std::string& file);
// The same for bytes [offset, offset + bytes) of it, whole elements.
void require_finite(const StoredTensor& tensor, std::uint64_t offset, const void* data, std::size_t bytes,
                    const std::string& file);

// Reads a tensor in pieces of at most kReadPiece bytes, checks each as require_finite does and hands it on.
// An empty tensor is one empty piece.
inline constexpr std::size_t kReadPiece = std::size_t{64} << 20U;
using PieceSink = std::function<void(std::uint64_t offset, const std::byte* data, std::size_t bytes)>;
void read_finite(const CheckpointReader& reader, const std::string& name, const PieceSink& sink);

}  // namespace quantmill
