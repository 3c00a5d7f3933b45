#include "pipeline/output_layout.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace quantmill {
namespace {

// Where a tensor stands in the file order: (part of the model, block, name).
using Position = std::tuple<int, int, std::string>;

Position position_of(const std::string& name, const ModelGraph& graph) {
    if (name == graph.embedding) return {0, 0, name};
    if (name.starts_with(graph.block_prefix)) {
        const std::string rest = name.substr(graph.block_prefix.size());
        const auto digits = rest.find_first_not_of("0123456789");
        if (digits != 0 && digits != std::string::npos) return {1, std::stoi(rest.substr(0, digits)), name};
    }
    if (name == graph.final_norm) return {2, 0, name};
    if (name == graph.lm_head) return {3, 0, name};
    return {4, 0, name};
}

struct Module {
    Linear linear;
    QuantizationGrid grid;
};

// The quantized linears by module name.
std::map<std::string, Module> quantized_modules(const ModelGraph& graph, const QuantizationScheme& scheme) {
    std::map<std::string, Module> modules;
    for_each_quantized(graph, scheme,
                       [&](int block, std::size_t, const LinearGroup& group, const GptqOptions& options) {
                           for (const Linear& linear : group.linears) {
                               modules.emplace(graph.in_block(block, linear.name),
                                               Module{linear, grid_for(options.grid, linear.columns)});
                           }
                       });
    return modules;
}

bool ends_with_take(const std::string& name, std::string_view suffix, std::string& stem) {
    if (!name.ends_with(suffix)) return false;
    stem = name.substr(0, name.size() - suffix.size());
    return true;
}

}  // namespace

std::uint64_t OutputLayout::total_bytes() const {
    std::uint64_t bytes = 0;
    for (const OutputShard& shard : shards) bytes += shard.bytes;
    return bytes;
}

QuantizationGrid grid_for(const QuantizationGrid& grid, std::int64_t columns) {
    QuantizationGrid own = grid;
    if (own.group_size < 0) own.group_size = columns;
    return own;
}

OutputLayout plan_output(const CheckpointReader& reader, const ModelGraph& graph,
                         const QuantizationScheme& scheme, std::uint64_t max_shard_size) {
    std::vector<Position> order;
    const bool tied = graph.lm_head == graph.embedding;
    const std::string head = "lm_head.weight";
    for (const auto& [name, tensor] : reader.tensors()) {
        if (!tied || name != head) order.push_back(position_of(name, graph));
    }
    if (tied && scheme.quantizes_head()) order.emplace_back(3, 0, head);
    std::sort(order.begin(), order.end());

    const auto modules = quantized_modules(graph, scheme);
    OutputLayout layout;
    std::vector<StoredTensor> tensors;
    for (const Position& position : order) {
        const std::string& name = std::get<2>(position);
        std::string stem;
        if (ends_with_take(name, ".weight", stem) && modules.contains(stem)) {
            const auto& [linear, grid] = modules.at(stem);
            for (StoredTensor& tensor : gptq_tensors(stem, linear.rows, linear.columns, grid)) {
                tensors.push_back(std::move(tensor));
            }
        } else if (ends_with_take(name, ".bias", stem) && modules.contains(stem)) {
            tensors.push_back({name, "F16", {modules.at(stem).linear.rows}, 0, 0});
        } else {
            tensors.push_back(reader.find(name));
            layout.copied.push_back(name);
        }
    }
    layout.shards = layout_shards(tensors, max_shard_size);
    return layout;
}

}  // namespace quantmill
