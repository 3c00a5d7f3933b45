#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
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
    // Throws InternalError naming tensors that were never written.
    void finish();

private:
    struct Shard;
    std::vector<std::unique_ptr<Shard>> shards_;
    std::map<std::string, Shard*> shard_of_;
};

// Creates the output directory with our marker (.quantmill/) in it and removes the checkpoint files
// that an earlier run left. Throws BadInput when it cannot be written, or is or lies in `source`;
// without `overwrite` also when it holds a finished checkpoint of ours or anything that is not
// ours.
void prepare_output_directory(const std::filesystem::path& directory, bool overwrite,
                              const std::filesystem::path& source = {});

// Copies everything of the source directory but weights, indexes, archives and the configs that we
// write (checkpoint-formats: "by exclusion"); follows symbolic links.
void copy_companion_files(const std::filesystem::path& source, const std::filesystem::path& directory);

}  // namespace quantmill
