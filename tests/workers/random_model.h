#pragma once

#include <filesystem>
#include <fstream>
#include <random>
#include <vector>

#include "kernels/half.h"
#include "tests/pipeline/tiny_checkpoint.h"

namespace quantmill::testing {

// A checkpoint directory with random BF16 weights, of a size at which one block takes milliseconds.
inline ModelGraph write_random_checkpoint(const std::filesystem::path& directory,
                                          const nlohmann::json& config, std::mt19937_64& random) {
    std::filesystem::create_directories(directory);
    std::ofstream(directory / "config.json") << config.dump();
    ModelGraph graph = build_model_graph(config, "config.json");
    std::vector<StoredTensor> tensors = tensors_of(graph, "BF16");
    std::ofstream file(directory / "model.safetensors", std::ios::binary);
    file << make_safetensors_header(tensors, {{"format", "pt"}});
    std::normal_distribution<float> normal;
    for (const StoredTensor& tensor : tensors) {
        const bool norm = tensor.shape.size() == 1;
        const float deviation = norm ? 0.2F : 1.0F / std::sqrt(static_cast<float>(tensor.shape.back()));
        for (std::int64_t i = 0; i < tensor.count(); ++i) {
            const float value = normal(random) * deviation + (norm ? 1.0F : 0.0F);
            std::uint32_t bits = 0;
            std::memcpy(&bits, &value, sizeof bits);
            const auto half = static_cast<std::uint16_t>(bits >> 16U);
            file.write(reinterpret_cast<const char*>(&half), sizeof half);
        }
    }
    return graph;
}

}  // namespace quantmill::testing
