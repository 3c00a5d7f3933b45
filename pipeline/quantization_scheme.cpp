#include "pipeline/quantization_scheme.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <iterator>
#include <string>

namespace quantmill {
namespace {

using nlohmann::ordered_json;

// What a checkpoint says of a linear; null: that it is left as it is.
ordered_json described(const std::optional<GptqOptions>& options) {
    if (!options) return nullptr;
    return {{"bits", options->grid.bits},
            {"group_size", options->grid.group_size},
            {"sym", options->grid.sym},
            {"desc_act", !natural_groups(*options)}};
}

std::string escaped(const std::string& name) {
    std::string result;
    for (const char c : name) result += c == '.' ? std::string("\\.") : std::string(1, c);
    return result;
}

std::string without(const std::string& text, std::string_view suffix) {
    return text.ends_with(suffix) ? text.substr(0, text.size() - suffix.size()) : text;
}

// "self_attn\.(?:q|k|v|qkv)_proj": the linears of a group, and what vLLM fuses them into.
std::string pattern_of(const LinearGroup& group) {
    constexpr std::string_view suffix = "_proj";
    if (group.linears.size() == 1) return escaped(group.linears.front().name);
    const std::string& first = group.linears.front().name;
    const std::string parent = first.substr(0, first.rfind('.') + 1);
    std::vector<std::string> stems;
    for (const Linear& linear : group.linears) {
        stems.push_back(without(linear.name.substr(parent.size()), suffix));
    }
    const bool letters = std::ranges::all_of(stems, [](const auto& stem) { return stem.size() == 1; });
    const std::string fused = fmt::format("{}", fmt::join(stems, letters ? "" : "_"));
    return fmt::format("{}(?:{}|{}){}", escaped(parent), fmt::join(stems, "|"), fused, suffix);
}

std::string pattern_of_blocks(const ModelGraph& graph, const std::vector<int>& blocks) {
    const std::string prefix = escaped(graph.block_prefix);
    if (static_cast<int>(blocks.size()) == graph.blocks) return prefix + "\\d+\\.";
    return fmt::format("{}(?:{})\\.", prefix, fmt::join(blocks, "|"));
}

std::vector<std::string> names_of(const LinearGroup& group) {
    std::vector<std::string> names;
    for (const Linear& linear : group.linears) names.push_back(linear.name);
    return names;
}

}  // namespace

QuantizationScheme::QuantizationScheme(const ModelGraph& graph, const GptqOptions& usual)
    : usual_(usual),
      choices_(static_cast<std::size_t>(graph.blocks),
               std::vector<std::optional<GptqOptions>>(graph.stages.size(), usual)) {
    choices_.emplace_back(graph.head.size());
}

void QuantizationScheme::set(int block, std::size_t stage, std::optional<GptqOptions> options) {
    choices_.at(static_cast<std::size_t>(block)).at(stage) = options;
}

const std::optional<GptqOptions>& QuantizationScheme::options_at(int block, std::size_t stage) const {
    return choices_.at(static_cast<std::size_t>(block)).at(stage);
}

ordered_json dynamic_of(const ModelGraph& graph, const QuantizationScheme& scheme) {
    const ordered_json usual = described(scheme.usual());
    ordered_json dynamic = ordered_json::object();
    const auto add = [&](const std::string& pattern, const ordered_json& choice) {
        dynamic[(choice.is_null() ? "-:^" : "^") + pattern + "$"] =
            choice.is_null() ? ordered_json::object() : choice;
    };
    for (std::size_t stage = 0; stage < graph.stages.size(); ++stage) {
        std::vector<std::pair<ordered_json, std::vector<int>>> choices;  // in the order of the blocks
        for (int block = 0; block < graph.blocks; ++block) {
            const ordered_json choice = described(scheme.options_at(block, stage));
            if (choice == usual) continue;
            auto found = std::ranges::find(choices, choice, [](const auto& c) { return c.first; });
            if (found == choices.end()) {
                choices.emplace_back(choice, std::vector<int>{});
                found = std::prev(choices.end());
            }
            found->second.push_back(block);
        }
        for (const auto& [choice, blocks] : choices) {
            add(pattern_of_blocks(graph, blocks) + pattern_of(graph.stages[stage].group), choice);
        }
    }
    if (scheme.quantizes_head()) {
        const ordered_json choice = described(scheme.options_at(graph.blocks, 0));
        if (choice != usual) add(pattern_of(graph.head.front().group), choice);
    }
    return dynamic.empty() ? ordered_json(nullptr) : dynamic;
}

ordered_json modules_in_block_of(const ModelGraph& graph, const QuantizationScheme& scheme) {
    bool all = true, alike = true;
    for (int block = 0; block < graph.blocks; ++block) {
        for (std::size_t stage = 0; stage < graph.stages.size(); ++stage) {
            const bool kept = scheme.options_at(block, stage).has_value();
            all = all && kept;
            alike = alike && kept == scheme.options_at(0, stage).has_value();
        }
    }
    if (all) return nullptr;
    ordered_json lists = ordered_json::array();
    for (int block = 0; block < (alike ? 1 : graph.blocks); ++block) {
        for (std::size_t stage = 0; stage < graph.stages.size(); ++stage) {
            if (!scheme.options_at(block, stage)) continue;
            std::vector<std::string> names = names_of(graph.stages[stage].group);
            for (std::string& name : names) name = alike ? name : graph.in_block(block, name);
            lists.push_back(names);
        }
    }
    return lists;
}

}  // namespace quantmill
