#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace quantmill {

// A linear layer of a block: weight [rows, columns], output rows by input columns.
struct Linear {
    std::string name;  // inside the block: "self_attn.q_proj"
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    bool bias = false;
};

// Linears that read the same input, so they share one Hessian and one factor.
struct LinearGroup {
    std::string name;  // "qkv"
    std::vector<Linear> linears;
    std::int64_t columns() const { return linears.front().columns; }
    std::int64_t rows() const;  // of all linears, one below the other
};

// How a stage's input is made: from the hidden state, or from the outputs of the stage before.
enum class StageInput { norm, attention, silu_mul };

struct Stage {
    StageInput input = StageInput::norm;
    std::string norm;  // weight of the RMSNorm when input is norm: "input_layernorm.weight"
    LinearGroup group;
    bool residual = false;  // the group's output is added to the hidden state
};

struct Attention {
    std::int64_t heads = 0;
    std::int64_t kv_heads = 0;
    std::int64_t head_dim = 0;
    std::int64_t window = 0;  // sliding window, 0: none
    bool qk_norm = false;     // RMSNorm of each head of q and k before the rotation (Qwen3)
};

// A decoder as data: every block runs the same stages in order. What differs between families is in
// here, so nothing above needs to know them. Tensor names are those of the checkpoint.
struct ModelGraph {
    std::string family;        // "llama"
    std::string architecture;  // "LlamaForCausalLM"
    std::int64_t hidden_size = 0;
    std::int64_t vocab_size = 0;
    std::int64_t max_positions = 0;
    int blocks = 0;
    float norm_eps = 0.0F;
    Attention attention;
    std::vector<float> inverse_frequencies;  // rotary embedding, [head_dim / 2], scaling applied
    std::vector<Stage> stages;
    std::string embedding = "model.embed_tokens.weight";
    std::string final_norm = "model.norm.weight";
    std::string lm_head = "lm_head.weight";  // the embedding's name when tied
    std::string block_prefix = "model.layers.";

    // Block number `blocks` stands for what follows the blocks: one stage, the final norm and lm_head, which
    // some jobs quantize too. Its names are those of the checkpoint.
    std::vector<Stage> head;
    const std::vector<Stage>& stages_of(int block) const { return block == blocks ? head : stages; }
    // "model.layers.3." + name
    std::string in_block(int block, const std::string& name) const;
    // The tensor with the weight of a linear: of a tied lm_head the embedding.
    std::string weight_of(int block, const Linear& linear) const;
    std::int64_t block_parameters() const;  // of the linears of one block
    // Names of the norm weights of one block, without prefix, with their lengths.
    std::vector<std::pair<std::string, std::int64_t>> norms() const;
    std::vector<std::pair<std::string, std::int64_t>> norms_of(int block) const;  // of the head its own
};

// Builds the graph of a checkpoint's config.json. Throws BadInput for an architecture that is not supported
// and for fields that change the mathematics in a way that is not implemented. `file` is for messages.
ModelGraph build_model_graph(const nlohmann::json& json, const std::string& file);

}  // namespace quantmill
