// write_random_checkpoint DIR SEED: random tensors of every type through our writer into DIR, and what they
// must hold into DIR/expected, for the test with the official Python package.
#include <fmt/format.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "kernels/error.h"
#include "pipeline/checkpoint_writer.h"

namespace {

using namespace quantmill;
namespace fs = std::filesystem;

const std::vector<std::string> kTypes = {"BOOL",    "F4",      "F6_E2M3", "F6_E3M2",     "U8",          "I8",
                                         "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16",
                                         "U16",     "F16",     "BF16",    "I32",         "U32",         "F32",
                                         "C64",     "F64",     "I64",     "U64"};

void write_checkpoint(const fs::path& directory, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<StoredTensor> tensors(random() % 80);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        tensors[i].name = fmt::format("model.\"é🦙\\{}.weight", i);
        tensors[i].dtype = kTypes[random() % kTypes.size()];
        for (std::size_t n = random() % 4; n > 0; --n) tensors[i].shape.push_back(random() % 9);
        if (safetensors_bits(tensors[i].dtype) < 8) tensors[i].shape.push_back(8);  // whole bytes
    }
    const auto shards = layout_shards(tensors, random() % 5000 + 1);
    std::vector<std::size_t> all(shards.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
    CheckpointWriter writer(directory, shards, all);
    auto expected = nlohmann::json::array();
    fs::create_directories(directory / "expected");
    for (const OutputShard& shard : shards) {
        for (const StoredTensor& tensor : shard.tensors) {
            std::string bytes(tensor.bytes(), '\0');
            for (char& byte : bytes) byte = static_cast<char>(random());
            writer.write(tensor.name, bytes.data(), bytes.size());
            write_text(directory / "expected" / std::to_string(expected.size()), bytes);
            expected.push_back({{"name", tensor.name},
                                {"dtype", tensor.dtype},
                                {"shape", tensor.shape},
                                {"file", shard.file_name}});
        }
    }
    writer.finish();
    write_text(directory / "model.safetensors.index.json", make_index_json(shards));
    write_text(directory / "expected.json", expected.dump());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    try {
        write_checkpoint(argv[1], static_cast<unsigned>(std::stoul(argv[2])));
    } catch (const Error& error) {
        fmt::print(stderr, "{}\n", error.what());
        return static_cast<int>(error.code());
    }
}
