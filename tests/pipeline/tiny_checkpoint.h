#pragma once

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/model_graph.h"
#include "pipeline/safetensors.h"
#include "tests/pipeline/temporary_directory.h"

namespace quantmill::testing {

// config.json of a tiny model: 2 blocks, width 64, 2 heads of 32 over 1 key/value head, inner width 96.
inline nlohmann::json tiny_config(const std::string& architecture) {
    return {{"architectures", {architecture}},
            {"hidden_size", 64},
            {"intermediate_size", 96},
            {"num_hidden_layers", 2},
            {"num_attention_heads", 2},
            {"num_key_value_heads", 1},
            {"vocab_size", 128},
            {"rms_norm_eps", 1e-5},
            {"head_dim", 32},
            {"rope_theta", 10000.0}};
}

// The tensors that a model of this graph is stored in.
inline std::vector<StoredTensor> tensors_of(const ModelGraph& graph, const std::string& dtype) {
    std::vector<StoredTensor> tensors{{graph.embedding, dtype, {graph.vocab_size, graph.hidden_size}, 0, 0},
                                      {graph.final_norm, dtype, {graph.hidden_size}, 0, 0}};
    if (graph.lm_head != graph.embedding) {
        tensors.push_back({graph.lm_head, dtype, {graph.vocab_size, graph.hidden_size}, 0, 0});
    }
    for (int block = 0; block < graph.blocks; ++block) {
        for (const auto& [norm, length] : graph.norms()) {
            tensors.push_back({graph.in_block(block, norm), dtype, {length}, 0, 0});
        }
        for (const Stage& stage : graph.stages) {
            for (const Linear& linear : stage.group.linears) {
                const std::string name = graph.in_block(block, linear.name);
                tensors.push_back({name + ".weight", dtype, {linear.rows, linear.columns}, 0, 0});
                if (linear.bias) tensors.push_back({name + ".bias", dtype, {linear.rows}, 0, 0});
            }
        }
    }
    return tensors;
}

// A file of these tensors, all zero.
inline void write_zeros(const std::filesystem::path& file, std::vector<StoredTensor> tensors) {
    const std::string header = make_safetensors_header(tensors, {{"format", "pt"}});
    std::ofstream(file, std::ios::binary) << header;
    std::filesystem::resize_file(file, tensors.back().end);
}

// Makes the directory a checkpoint with zero weights and returns its graph; `extra` are tensors beside the
// model's.
inline ModelGraph write_tiny_checkpoint(const TemporaryDirectory& directory, const nlohmann::json& config,
                                        const std::vector<StoredTensor>& extra = {}) {
    directory.write("config.json", config.dump());
    ModelGraph graph = build_model_graph(config, "config.json");
    std::vector<StoredTensor> tensors = tensors_of(graph, "BF16");
    tensors.insert(tensors.end(), extra.begin(), extra.end());
    write_zeros(directory / "model.safetensors", std::move(tensors));
    return graph;
}

}  // namespace quantmill::testing
