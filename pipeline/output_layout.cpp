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

// The quantized linears by module name.
std::map<std::string, Linear> quantized_modules(const ModelGraph& graph) {
    std::map<std::string, Linear> modules;
    for (int block = 0; block < graph.blocks; ++block) {
        for (const Stage& stage : graph.stages) {
            for (const Linear& linear : stage.group.linears) {
                modules.emplace(graph.in_block(block, linear.name), linear);
            }
        }
    }
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
                         const QuantizationGrid& grid, std::uint64_t max_shard_size) {
    std::vector<Position> order;
    for (const auto& [name, tensor] : reader.tensors()) order.push_back(position_of(name, graph));
    std::sort(order.begin(), order.end());

    const auto modules = quantized_modules(graph);
    const bool tied = graph.lm_head == graph.embedding;
    OutputLayout layout;
    std::vector<StoredTensor> tensors;
    for (const Position& position : order) {
        const std::string& name = std::get<2>(position);
        std::string stem;
        if (tied && name == "lm_head.weight") continue;
        if (ends_with_take(name, ".weight", stem) && modules.contains(stem)) {
            const Linear& linear = modules.at(stem);
            const QuantizationGrid own = grid_for(grid, linear.columns);
            for (StoredTensor& tensor : gptq_tensors(stem, linear.rows, linear.columns, own)) {
                tensors.push_back(std::move(tensor));
            }
        } else if (ends_with_take(name, ".bias", stem) && modules.contains(stem)) {
            tensors.push_back({name, "F16", {modules.at(stem).rows}, 0, 0});
        } else {
            tensors.push_back(reader.find(name));
            layout.copied.push_back(name);
        }
    }
    layout.shards = layout_shards(tensors, max_shard_size);
    return layout;
}

}  // namespace quantmill
