#include "pipeline/model_graph.h"

#include <array>
#include <numeric>
#include <string_view>

#include "pipeline/families/families.h"

namespace quantmill {
namespace {

struct Family {
    std::string_view architecture;
    ModelGraph (*build)(ModelConfig&);
};

constexpr std::array<Family, 4> kFamilies{{{"LlamaForCausalLM", llama},
                                           {"MistralForCausalLM", mistral},
                                           {"Qwen2ForCausalLM", qwen2},
                                           {"Qwen3ForCausalLM", qwen3}}};

std::string architecture_of(const nlohmann::json& config, const std::string& file) {
    const auto list = config.find("architectures");
    if (list == config.end() || !list->is_array() || list->size() != 1 || !list->front().is_string()) {
        throw BadInput("{}: field 'architectures' must name the one architecture of the model", file);
    }
    return list->front().get<std::string>();
}

// transformers chooses the code by model_type, so a contradiction leaves open which model is meant.
void require_same_model_type(ModelConfig& config, const ModelGraph& graph) {
    const std::string type = config.text("model_type", graph.family);
    if (type == graph.family) return;
    throw BadInput("{}: model_type '{}' contradicts the architecture '{}', which is of model_type '{}'",
                   config.file(), type, graph.architecture, graph.family);
}

}  // namespace

std::int64_t LinearGroup::rows() const {
    return std::accumulate(linears.begin(), linears.end(), std::int64_t{0},
                           [](std::int64_t sum, const Linear& linear) { return sum + linear.rows; });
}

std::string ModelGraph::in_block(int block, const std::string& name) const {
    return block == blocks ? name : block_prefix + std::to_string(block) + "." + name;
}

std::string ModelGraph::weight_of(int block, const Linear& linear) const {
    return block == blocks ? lm_head : in_block(block, linear.name + ".weight");
}

std::int64_t ModelGraph::block_parameters() const {
    std::int64_t parameters = 0;
    for (const Stage& stage : stages) parameters += stage.group.rows() * stage.group.columns();
    return parameters;
}

std::vector<std::pair<std::string, std::int64_t>> ModelGraph::norms() const {
    std::vector<std::pair<std::string, std::int64_t>> result;
    for (const Stage& stage : stages) {
        if (stage.input == StageInput::norm) result.emplace_back(stage.norm, hidden_size);
    }
    if (attention.qk_norm) {
        result.emplace_back("self_attn.q_norm.weight", attention.head_dim);
        result.emplace_back("self_attn.k_norm.weight", attention.head_dim);
    }
    return result;
}

std::vector<std::pair<std::string, std::int64_t>> ModelGraph::norms_of(int block) const {
    if (block < blocks) return norms();
    return {{final_norm, hidden_size}};
}

ModelGraph build_model_graph(const nlohmann::json& json, const std::string& file) {
    const std::string architecture = architecture_of(json, file);
    for (const Family& family : kFamilies) {
        if (family.architecture != architecture) continue;
        ModelConfig config(json, file);
        ModelGraph graph = family.build(config);
        graph.architecture = architecture;
        graph.head = {{StageInput::norm,
                       graph.final_norm,
                       {"lm_head", {{"lm_head", graph.vocab_size, graph.hidden_size, false}}},
                       false}};
        require_same_model_type(config, graph);
        config.refuse_unknown_fields();
        return graph;
    }
    std::string known;
    for (const Family& family : kFamilies) {
        known += known.empty() ? "" : ", ";
        known += family.architecture;
    }
    throw BadInput("{}: architecture '{}' is not supported ({})", file, architecture, known);
}

}  // namespace quantmill
