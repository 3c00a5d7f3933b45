#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "workers/cost_model.h"
#include "workers/layer_plan.h"
#include "workers/prepared_job.h"

namespace quantmill {

// The ranks of a job, or of one that is imagined.
struct World {
    std::vector<std::string> hosts;          // [rank]
    std::vector<std::uint64_t> memory;       // [rank]: free bytes of its device
    std::vector<std::uint64_t> host_memory;  // [rank]: its share of what is free on its host
    int size() const { return static_cast<int>(hosts.size()); }
    int host_count() const;
};
// What of a device's free memory tensors can fill: allocations of many sizes leave gaps in a pool.
std::size_t usable_device_memory(std::size_t free);

// This job's own ranks; those that share a GPU share its memory. Collective.
World gather_world(Control& control, const Backend& backend);
// Ranks like the first of `real`, that many on a host, whose memory they share; `cores`: they are no GPUs,
// whose memory is their own.
World imagine_world(int size, int ranks_per_host, const World& real, bool cores);
// Ranks of that much memory.
World imagine_world(int size, int ranks_per_host, std::uint64_t memory);

// What plans need to know of a job.
struct PlannedWork {
    const ModelGraph* graph = nullptr;
    std::vector<BatchShard> shards;
    DType activation = DType::f32;
    std::size_t stored_bytes = 2;                  // of a weight in the checkpoint
    double read_bytes = 0.0, written_bytes = 0.0;  // of all tensors
    double factors = 1.0, solves = 1.0;            // of each Hessian: several outputs need several
    std::int64_t probe_tokens = 0;                 // of a BlockProbe, after each solve
    GptqOptions options;                           // of the first output
};
// Of a job that writes these checkpoints.
PlannedWork planned_work(std::span<const PreparedJob> outputs, const Backend& backend);
// Of one block: a BlockProbe's forward passes count as solving.
BlockCost block_cost(const PlannedWork& work, const Rates& rates, double tokens);
// Whether two outputs can share the factor of a Hessian.
bool same_factor(const GptqOptions& a, const GptqOptions& b);

// Seconds at which the parts of a group's work end, counted from the start of the job.
struct GroupTimeline {
    double first_item = 0.0;  // the first hidden states arrive
    double streamed = 0.0;    // the last ones have passed, in the last sweep
    double solved = 0.0;
    double written = 0.0;
    double stream_seconds = 0.0, reduce_seconds = 0.0, solve_seconds = 0.0,
           idle_seconds = 0.0;  // of all sweeps
};
std::vector<GroupTimeline> simulate(const PlannedWork& work, const World& world, const Rates& rates,
                                    const LayerPlan& plan);
double total_seconds(const std::vector<GroupTimeline>& groups);

// The groups and sweeps of a job with propagate: original. `groups`: compute.layer_groups, none: those of
// which the simulation expects most, the fewest of them when there is little between. Throws BadInput with
// advice when the job does not fit that many groups, or a group's memory.
LayerPlan plan_layers(const PlannedWork& work, const World& world, const Rates& rates,
                      std::optional<std::int64_t> groups);

// The ranks that share rows with propagate: quantized, where all work on the same block: `groups`, or those
// of a host, whose links are fast. Each group solves all rows, so that they need not travel between groups.
LayerPlan row_groups(const World& world, std::optional<std::int64_t> groups);

// What suits this job on these ranks, by a rate that is the same in every run.
LayerPlan layers_of(std::span<const PreparedJob> outputs, const World& world, const Backend& backend);

// Bytes that a rank of `plan` holds at most, by purpose.
struct LayerMemory {
    std::uint64_t blocks = 0;   // weights and Hessians
    std::uint64_t hidden = 0;   // hidden states
    std::uint64_t scratch = 0;  // everything else
    std::uint64_t total() const { return blocks + hidden + scratch; }
};
LayerMemory layer_memory(const PlannedWork& work, const LayerPlan& plan, int rank);

// The micro-batches of the rank that has fewest, of those that have any: what fills a pipeline.
double items_in_stream(const PlannedWork& work, const LayerPlan& plan);

}  // namespace quantmill
