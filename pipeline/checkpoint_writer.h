#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "pipeline/files.h"
#include "pipeline/safetensors.h"

namespace quantmill {

// One file of the output checkpoint, byte for byte, known before the first FLOP.
struct OutputShard {
    std::string file_name;              // model-00001-of-00002.safetensors
    std::vector<StoredTensor> tensors;  // begin and end are set
    std::string header;                 // the file's first bytes
    std::uint64_t bytes = 0;            // of the whole file
};

// Splits tensors, in order, into files of at most max_shard_size bytes (a larger tensor gets a file
// of its own) and lays each out.
std::vector<OutputShard> layout_shards(const std::vector<StoredTensor>& tensors,
                                       std::uint64_t max_shard_size);

// {"metadata": {"total_size"}, "weight_map"} of the whole checkpoint.
std::string make_index_json(const std::vector<OutputShard>& shards);

// Writes the shards that this rank owns, tensor by tensor in any order, at their planned offsets. A
// shard appears under its name when its last tensor has been written.
class CheckpointWriter {
public:
    // `owned`: indices into shards.
    CheckpointWriter(std::filesystem::path directory, const std::vector<OutputShard>& shards,
                     const std::vector<std::size_t>& owned);
    ~CheckpointWriter();

    bool owns(const std::string& tensor) const;
    // Throws InternalError for a tensor that is not owned, written before, or of another size.
    void write(const std::string& tensor, const void* data, std::size_t bytes);
    // A piece [offset, offset + bytes) of a tensor that is streamed; pieces come in order.
    void write_piece(const std::string& tensor, std::uint64_t offset, const void* data, std::size_t bytes);
    // Throws InternalError naming tensors that were never written, InfrastructureError naming a shard
    // that is not there with its planned size.
    void finish();

private:
    struct Shard;
    std::vector<std::unique_ptr<Shard>> shards_;
    std::map<std::string, Shard*> shard_of_;
};

}  // namespace quantmill
