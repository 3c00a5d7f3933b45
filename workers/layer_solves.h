#pragma once

#include <string>
#include <vector>

#include "pipeline/output_layout.h"
#include "workers/layer_plan.h"

namespace quantmill {

// Everything that a group solves after a sweep, and who does. All ranks know it of all groups.
struct SweepSolves {
    std::vector<SolveTask> tasks;
    SolvePlan plan;
};
SweepSolves solves_of(const ModelGraph& graph, const std::string& backend, const LayerPlan& plan,
                      std::size_t sweep, std::size_t group);

// Calls visit(rank that leads, task) for all tasks of a job, those of a rank in the order in which it solves
// them.
template <class Visit>
void for_each_solve(const ModelGraph& graph, const std::string& backend, const LayerPlan& plan,
                    const Visit& visit) {
    for (std::size_t sweep = 0; sweep < plan.sweeps.size(); ++sweep) {
        for (std::size_t group = 0; group < plan.groups.size(); ++group) {
            const SweepSolves solves = solves_of(graph, backend, plan, sweep, group);
            for (std::size_t team = 0; team < solves.plan.tasks.size(); ++team) {
                const int leader = plan.groups[group][static_cast<std::size_t>(solves.plan.leader[team])];
                for (const std::size_t task : solves.plan.tasks[team]) visit(leader, solves.tasks[task]);
            }
        }
    }
}

// The output tensors that a task makes.
std::vector<std::string> tensors_of(const ModelGraph& graph, const SolveTask& task);

// The rank that writes each output shard: the one that makes most of its bytes.
std::vector<int> writers_of(const ModelGraph& graph, const std::string& backend, const LayerPlan& plan,
                            const OutputLayout& layout);

}  // namespace quantmill
