#pragma once

#include "pipeline/model_config.h"
#include "pipeline/model_graph.h"

namespace quantmill {

// One builder a family; model_graph.cpp lists them by architecture. docs/families.md shows how to add one.
ModelGraph llama(ModelConfig& config);
ModelGraph mistral(ModelConfig& config);
ModelGraph qwen2(ModelConfig& config);
ModelGraph qwen3(ModelConfig& config);

// What distinguishes dense decoders with RMSNorm, rotary embedding, grouped-query attention and a gated MLP.
struct DenseDecoder {
    bool qkv_bias = false;
    bool o_bias = false;
    bool mlp_bias = false;
    bool qk_norm = false;
    std::int64_t window = 0;
    std::int64_t head_dim = 0;  // 0: hidden_size / heads
};
// Throws BadInput for use_sliding_window: Qwen's per-layer windows are not implemented.
void refuse_sliding_window(ModelConfig& config);
ModelGraph dense_decoder(ModelConfig& config, const std::string& family, const DenseDecoder& traits);

}  // namespace quantmill
