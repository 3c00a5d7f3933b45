#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "pipeline/gptq_solver.h"
#include "pipeline/model_graph.h"

namespace quantmill {

// How each linear of a model is quantized, or that it stays as it is: one choice for each LinearGroup, whose
// linears share a Hessian and are fused by those who serve them. Block number graph.blocks is lm_head.
class QuantizationScheme {
public:
    // All linears of the blocks alike; lm_head stays as it is.
    QuantizationScheme(const ModelGraph& graph, const GptqOptions& usual);

    void set(int block, std::size_t stage, std::optional<GptqOptions> options);
    // Nothing: left as it is. grid.group_size as in the job: -1 is one group a row.
    const std::optional<GptqOptions>& options_at(int block, std::size_t stage) const;
    const GptqOptions& usual() const { return usual_; }
    bool quantizes_head() const { return choices_.back().front().has_value(); }
    // Blocks to go through, lm_head as the last when it is quantized.
    int blocks() const { return static_cast<int>(choices_.size()) - (quantizes_head() ? 0 : 1); }

private:
    GptqOptions usual_;
    std::vector<std::vector<std::optional<GptqOptions>>> choices_;  // [block][stage]
};

// Calls visit(block, stage, group, options) for every LinearGroup that is quantized.
template <class Visit>
void for_each_quantized(const ModelGraph& graph, const QuantizationScheme& scheme, const Visit& visit) {
    for (int block = 0; block < scheme.blocks(); ++block) {
        const std::vector<Stage>& stages = graph.stages_of(block);
        for (std::size_t stage = 0; stage < stages.size(); ++stage) {
            const std::optional<GptqOptions>& options = scheme.options_at(block, stage);
            if (options) visit(block, stage, stages[stage].group, *options);
        }
    }
}

// quantization_config.dynamic of GPTQModel: what differs from scheme.usual(), by regular expressions of which
// one at most matches a module, split or fused ("qkv_proj"); "-:" skips. null when nothing differs.
nlohmann::ordered_json dynamic_of(const ModelGraph& graph, const QuantizationScheme& scheme);

// quantization_config.modules_in_block_to_quantize: lists of names for transformers, of a block when all
// blocks are alike, else whole ones. null when no linear of a block is left as it is.
nlohmann::ordered_json modules_in_block_of(const ModelGraph& graph, const QuantizationScheme& scheme);

}  // namespace quantmill
