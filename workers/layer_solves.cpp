#include "workers/layer_solves.h"

#include <algorithm>
#include <map>

#include "pipeline/gptq_format.h"
#include "workers/cost_model.h"

namespace quantmill {

SweepSolves solves_of(const ModelGraph& graph, const std::string& backend, const LayerPlan& plan,
                      std::size_t sweep, std::size_t group) {
    SweepSolves solves;
    const Rates rates = usual_rates(backend);
    const BlockRange range = plan.sweeps[sweep][group];
    for (int block = range.begin; block < range.end; ++block) {
        const std::vector<StageWork> work = stage_work(graph.stages_of(block), graph.attention, 0.0);
        for (std::size_t stage = 0; stage < work.size(); ++stage) {
            solves.tasks.push_back(
                {block, stage, rates.factor_seconds(work[stage]), work[stage].solve / rates.solve});
        }
    }
    solves.plan = plan_solves(solves.tasks, static_cast<int>(plan.groups[group].size()));
    return solves;
}

std::vector<std::string> tensors_of(const ModelGraph& graph, const SolveTask& task) {
    std::vector<std::string> names;
    for (const Linear& linear : graph.stages_of(task.block)[task.stage].group.linears) {
        const std::string prefix = graph.in_block(task.block, linear.name);
        for (const StoredTensor& tensor : gptq_tensors(prefix, linear.rows, linear.columns, {})) {
            names.push_back(tensor.name);
        }
        if (linear.bias) names.push_back(prefix + ".bias");
    }
    return names;
}

std::vector<int> writers_of(const ModelGraph& graph, const std::string& backend, const LayerPlan& plan,
                            const OutputLayout& layout) {
    std::map<std::string, int> made_by;
    for_each_solve(graph, backend, plan, [&](int leader, const SolveTask& task) {
        for (const std::string& name : tensors_of(graph, task)) made_by[name] = leader;
    });
    int ranks = 0;
    for (const auto& group : plan.groups) ranks += static_cast<int>(group.size());
    std::vector<int> writers;
    for (const OutputShard& shard : layout.shards) {
        std::map<int, std::uint64_t> bytes;
        for (const StoredTensor& tensor : shard.tensors) {
            const auto maker = made_by.find(tensor.name);
            if (maker != made_by.end()) bytes[maker->second] += tensor.bytes();
        }
        const auto most = std::max_element(bytes.begin(), bytes.end(),
                                           [](const auto& a, const auto& b) { return a.second < b.second; });
        // A shard of copied tensors alone: dealt in turn.
        writers.push_back(most != bytes.end() ? most->first : static_cast<int>(writers.size()) % ranks);
    }
    return writers;
}

}  // namespace quantmill
