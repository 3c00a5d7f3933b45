#include "workers/layer_planner.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "kernels/cpu/free_memory.h"
#include "pipeline/hessian.h"
#include "pipeline/refinement.h"
#include "workers/block_probe.h"
#include "workers/calibration_batches.h"
#include "workers/hidden_stream.h"

namespace quantmill {
namespace {

// A plan of more groups must promise this much more, since its predictions are not better than that.
constexpr double kWorthMoreGroups = 0.97;

// Bytes a second of finished tensors that a rank hands to the writers of their files, over MPI after the last
// solve.
constexpr double kDelivery = 1.5e9;

double hessian_bytes(const ModelGraph& graph) {
    double bytes = 0.0;
    for (const Stage& stage : graph.stages) {
        const auto n = static_cast<double>(stage.group.columns());
        bytes += n * (n + 1.0) / 2.0 * sizeof(std::int64_t);
    }
    return bytes;
}

// Of weights as stored and as multiplied with, and of Hessians.
std::uint64_t bytes_of_block(const PlannedWork& work) {
    std::uint64_t bytes = static_cast<std::uint64_t>(work.graph->block_parameters()) *
                          (work.stored_bytes + size_of(work.activation));
    for (const Stage& stage : work.graph->stages) bytes += HessianAccumulator::bytes(stage.group.columns());
    return bytes + BlockProbe::block_bytes(*work.graph, work.probe_tokens, work.activation);
}

struct RankLoad {
    double tokens = 0.0;
    double items = 0.0;
};

RankLoad load_of(const PlannedWork& work, int index, std::size_t group_size) {
    RankLoad load;
    for (const StreamItem& item : stream_items(work.shards, index, group_size)) {
        load.tokens += static_cast<double>(item.batch->sequences.tokens());
        load.items += 1.0;
    }
    return load;
}

double speed_of_group(const PlannedWork& work, std::size_t size) {
    double busiest = 0.0, all = 0.0;
    for (std::size_t index = 0; index < size; ++index) {
        const double tokens = load_of(work, static_cast<int>(index), size).tokens;
        busiest = std::max(busiest, tokens);
        all += tokens;
    }
    return all / busiest;
}

std::uint64_t scratch_bytes(const PlannedWork& work, bool first_group) {
    const ModelGraph& graph = *work.graph;
    const std::int64_t batch = limits_of(work.shards).tokens;
    std::uint64_t bytes =
        BlockForward::scratch_bytes(graph, batch, work.activation) +
        static_cast<std::uint64_t>(batch * BlockForward::carried_width(graph)) * size_of(work.activation);
    std::uint64_t solve = 0;
    for (const Stage& stage : graph.stages) {
        const std::int64_t rows = stage.group.rows(), columns = stage.group.columns();
        // Rows in fp32, the same dequantized, and their codes; the damped Hessian, with act-order twice.
        const std::int64_t squares = refines(work.options) ? (natural_groups(work.options) ? 1 : 2) : 0;
        solve =
            std::max(solve, static_cast<std::uint64_t>(rows * columns * 9 + squares * columns * columns * 4));
    }
    bytes += solve + BlockProbe::scratch_bytes(graph, work.probe_tokens, work.activation);
    if (first_group) {
        bytes += static_cast<std::uint64_t>(graph.vocab_size * graph.hidden_size) * work.stored_bytes;
    }
    return bytes;
}

// Blocks that every rank can hold at once, with the hidden states that several sweeps would keep or not.
int blocks_that_fit(const PlannedWork& work, const World& world, const std::vector<std::vector<int>>& groups,
                    bool several_sweeps) {
    const std::int64_t batch = limits_of(work.shards).tokens;
    std::int64_t fit = work.graph->blocks;
    for (std::size_t g = 0; g < groups.size(); ++g) {
        for (std::size_t i = 0; i < groups[g].size(); ++i) {
            const double tokens = load_of(work, static_cast<int>(i), groups[g].size()).tokens;
            const std::uint64_t fixed =
                scratch_bytes(work, g == 0) + HiddenStream::bytes(work.graph->hidden_size,
                                                                  static_cast<std::int64_t>(tokens), batch,
                                                                  several_sweeps && g == 0, work.activation);
            const std::uint64_t free = world.memory[static_cast<std::size_t>(groups[g][i])];
            const std::uint64_t left = free > fixed ? free - fixed : 0;
            fit = std::min(fit, static_cast<std::int64_t>(left / bytes_of_block(work)));
        }
    }
    return static_cast<int>(fit);
}

std::vector<double> block_costs(const PlannedWork& work, const Rates& rates) {
    const double tokens = static_cast<double>(tokens_of_shards(work.shards));
    const BlockCost cost = block_cost(work, rates, tokens);
    std::vector<double> costs(static_cast<std::size_t>(work.graph->blocks),
                              cost.stream + work.factors * cost.factors() + work.solves * cost.solves());
    const LinearGroup& last = work.graph->stages.back().group;
    costs.back() -= tokens * 2.0 * static_cast<double>(last.rows() * last.columns()) / rates.forward;
    return costs;
}

// A plan of these groups, or nothing when not even one block fits a rank.
std::optional<LayerPlan> plan_groups(const PlannedWork& work, const World& world, const Rates& rates,
                                     int count) {
    LayerPlan plan;
    plan.groups = form_groups(world.hosts, count);
    const int blocks = work.graph->blocks;
    std::vector<double> speeds;
    for (const auto& group : plan.groups) speeds.push_back(speed_of_group(work, group.size()));
    const std::vector<double> costs = block_costs(work, rates);
    std::vector<BlockRange> ranges = cut_blocks(costs, speeds, blocks);
    const auto longest = [](const std::vector<BlockRange>& all) {
        return std::max_element(
                   all.begin(), all.end(),
                   [](const BlockRange& a, const BlockRange& b) { return a.count() < b.count(); })
            ->count();
    };
    if (longest(ranges) > blocks_that_fit(work, world, plan.groups, false)) {
        const int fit = blocks_that_fit(work, world, plan.groups, true);
        if (fit == 0) return std::nullopt;
        const int sweeps = std::max(2, (blocks + count * fit - 1) / (count * fit));
        std::vector<double> all_speeds;
        for (int s = 0; s < sweeps; ++s) all_speeds.insert(all_speeds.end(), speeds.begin(), speeds.end());
        ranges = cut_blocks(costs, all_speeds, fit);
    }
    for (std::size_t i = 0; i < ranges.size(); i += speeds.size()) {
        plan.sweeps.emplace_back(ranges.begin() + static_cast<std::ptrdiff_t>(i),
                                 ranges.begin() + static_cast<std::ptrdiff_t>(i + speeds.size()));
    }
    return plan;
}

double solve_seconds(const PlannedWork& work, const BlockCost& cost, int blocks, int ranks) {
    std::vector<SolveTask> tasks;
    for (int block = 0; block < blocks; ++block) {
        for (std::size_t stage = 0; stage < cost.factor.size(); ++stage) {
            tasks.push_back(
                {block, stage, work.factors * cost.factor[stage], work.solves * cost.solve[stage]});
        }
    }
    return plan_solves(tasks, ranks).seconds;
}

bool spans_hosts(const World& world, const std::vector<int>& ranks) {
    return std::any_of(ranks.begin(), ranks.end(), [&](int rank) {
        return world.hosts[static_cast<std::size_t>(rank)] != world.hosts[static_cast<std::size_t>(ranks[0])];
    });
}

// lm_head goes with the last block, to whom holds it.
void add_head(LayerPlan& plan, int blocks) {
    std::vector<BlockRange>& ranges = plan.sweeps.back();
    auto last = std::ranges::find(ranges, blocks, &BlockRange::end);
    last->end = blocks + 1;
    for (++last; last != ranges.end(); ++last) *last = {blocks + 1, blocks + 1};
}

// Of its weights as stored and as multiplied with, and of its Hessian.
std::uint64_t bytes_of_head(const PlannedWork& work) {
    const LinearGroup& head = work.graph->head.front().group;
    return static_cast<std::uint64_t>(head.rows() * head.columns()) *
               (work.stored_bytes + size_of(work.activation)) +
           HessianAccumulator::bytes(head.columns());
}

}  // namespace

int World::host_count() const {
    return static_cast<int>(std::set<std::string>(hosts.begin(), hosts.end()).size());
}

std::size_t usable_device_memory(std::size_t free) {
    const std::size_t gaps = (std::size_t{64} << 20U) + free / 32;
    return free - std::min(free, gaps);
}

World gather_world(Control& control, const Backend& backend) {
    const std::vector<std::string> devices = control.all_gather(backend.unique_device());
    const auto sharing = backend.host_memory()
                             ? control.local_size()
                             : static_cast<int>(std::ranges::count(devices, backend.unique_device()));
    const std::size_t free = backend.free_memory(sharing);
    const nlohmann::json mine{control.host(), backend.host_memory() ? free : usable_device_memory(free),
                              free_host_memory() / static_cast<std::size_t>(control.local_size())};
    World world;
    for (const std::string& message : control.all_gather(mine.dump())) {
        const auto fact = nlohmann::json::parse(message);
        world.hosts.push_back(fact.at(0).get<std::string>());
        world.memory.push_back(fact.at(1).get<std::uint64_t>());
        world.host_memory.push_back(fact.at(2).get<std::uint64_t>());
    }
    return world;
}

World imagine_world(int size, int ranks_per_host, const World& real, bool cores) {
    const auto now =
        static_cast<std::uint64_t>(std::count(real.hosts.begin(), real.hosts.end(), real.hosts.front()));
    const auto then = static_cast<std::uint64_t>(std::min(size, ranks_per_host));
    World world =
        imagine_world(size, ranks_per_host, cores ? real.memory.front() * now / then : real.memory.front());
    world.host_memory.assign(world.hosts.size(), real.host_memory.front() * now / then);
    return world;
}

World imagine_world(int size, int ranks_per_host, std::uint64_t memory) {
    World world;
    for (int rank = 0; rank < size; ++rank) {
        world.hosts.push_back(fmt::format("host{}", rank / ranks_per_host));
        world.memory.push_back(memory);
        world.host_memory.push_back(memory);
    }
    return world;
}

bool same_factor(const GptqOptions& a, const GptqOptions& b) {
    const bool same_order = a.desc_act == b.desc_act && a.act_group_aware == b.act_group_aware &&
                            (!a.act_group_aware || a.grid.group_size == b.grid.group_size);
    return a.damp_percent == b.damp_percent && a.auto_damping == b.auto_damping &&
           a.damp_auto_increment == b.damp_auto_increment && same_order;
}

PlannedWork planned_work(std::span<const PreparedJob> outputs, const Backend& backend) {
    const PreparedJob& job = outputs.front();
    PlannedWork work;
    work.graph = &job.graph;
    work.options = job.scheme.options_at(0, 0).value_or(job.scheme.usual());
    work.shards = job.shards;
    if (job.measures) work.probe_tokens = BlockProbe::sequences_of(job.shards).tokens();
    work.activation = backend.activation_dtype();
    work.stored_bytes =
        size_of(dtype_from_safetensors(job.reader.find(job.graph.embedding).dtype).value_or(DType::f32));
    work.read_bytes = static_cast<double>(job.reader.total_bytes());
    for (std::size_t o = 0; o < outputs.size(); ++o) {
        work.written_bytes += static_cast<double>(outputs[o].layout.total_bytes());
        if (o == 0) continue;
        work.solves += 1.0;
        if (!same_factor(outputs[o - 1].scheme.usual(), outputs[o].scheme.usual())) work.factors += 1.0;
    }
    return work;
}

BlockCost block_cost(const PlannedWork& work, const Rates& rates, double tokens) {
    const auto length = static_cast<double>(limits_of(work.shards).length);
    BlockCost cost = block_cost(*work.graph, rates, tokens, length, work.options);
    double forward = 0.0;  // of a token
    for (const StageWork& stage : stage_work(work.graph->stages, work.graph->attention, length)) {
        forward += rates.forward_seconds(stage);
    }
    for (double& solve : cost.solve) solve += static_cast<double>(work.probe_tokens) * forward;
    return cost;
}

double items_in_stream(const PlannedWork& work, const LayerPlan& plan) {
    double fewest = 0.0;
    for (const auto& group : plan.groups) {
        for (std::size_t index = 0; index < group.size(); ++index) {
            const double items = load_of(work, static_cast<int>(index), group.size()).items;
            if (items > 0.0 && (fewest == 0.0 || items < fewest)) fewest = items;
        }
    }
    return fewest;
}

std::vector<GroupTimeline> simulate(const PlannedWork& work, const World& world, const Rates& rates,
                                    const LayerPlan& plan) {
    const ModelGraph& graph = *work.graph;
    const BlockCost one_token = block_cost(work, rates, 1.0);
    const double block_bytes =
        static_cast<double>(graph.block_parameters()) * static_cast<double>(work.stored_bytes);
    const double embedding =
        static_cast<double>(graph.vocab_size * graph.hidden_size) * static_cast<double>(work.stored_bytes);
    // What stays as it is is copied beside all else.
    const double copied = std::max(0.0, work.read_bytes - block_bytes * graph.blocks) * work.solves;
    const double write_share = std::max(0.0, work.written_bytes - copied) / graph.blocks;
    const double disk_share = rates.disk * world.host_count() / world.size();  // ranks of a host share it
    const double reading = rates.reading > 0.0 ? rates.reading : disk_share;
    const double writing = std::min(rates.writing, disk_share);
    std::vector<GroupTimeline> lines(plan.groups.size());
    std::vector<double> item_seconds(plan.groups.size(), 0.0), free_at(plan.groups.size(), 0.0),
        delivery(plan.groups.size(), 0.0);
    for (std::size_t s = 0; s < plan.sweeps.size(); ++s) {
        double first_arrival = 0.0, last_arrival = 0.0;
        if (s > 0) {  // back from the last group
            first_arrival = lines.back().first_item + item_seconds.back();
            last_arrival = lines.back().streamed;
        }
        for (std::size_t g = 0; g < plan.groups.size(); ++g) {
            GroupTimeline& line = lines[g];
            const std::vector<int>& group = plan.groups[g];
            const int blocks = plan.sweeps[s][g].count();
            const RankLoad load = load_of(work, 0, group.size());
            const double stream = plan.streams ? blocks * load.tokens * one_token.stream : 0.0;
            item_seconds[g] = stream / load.items;
            const double read =
                block_bytes + (plan.streams ? 0.0 : hessian_bytes(graph));  // from their store
            const auto ranks = static_cast<double>(group.size());
            const double first_read = plan.streams && g == 0 && s == 0 ? embedding : 0.0;
            const double loaded = free_at[g] + (blocks * read + first_read) / (reading * ranks);
            const double begin = plan.streams ? std::max(loaded, first_arrival) : loaded;
            line.first_item = begin;
            line.streamed = plan.streams ? std::max(begin + stream, last_arrival + item_seconds[g]) : begin;
            line.idle_seconds += std::max(0.0, line.streamed - loaded - stream);
            const double carries = spans_hosts(world, group) ? rates.network : rates.link;
            const double reduce =
                plan.streams && group.size() > 1 ? blocks * hessian_bytes(graph) / carries : 0.0;
            const double solve = solve_seconds(work, one_token, blocks, static_cast<int>(group.size()));
            line.solved = line.streamed + reduce + solve;
            // Of what a group of several ranks makes, each rank writes its part of the files, beside the
            // solves.
            const double made = write_share * blocks / ranks;
            delivery[g] += made * (ranks - 1.0) / ranks / kDelivery;
            line.written = std::max(line.solved, line.streamed + reduce + made / writing) + delivery[g];
            line.stream_seconds += stream;
            line.reduce_seconds += reduce;
            line.solve_seconds += solve;
            free_at[g] = line.solved;
            first_arrival = begin + item_seconds[g];
            last_arrival = line.streamed;
        }
    }
    return lines;
}

double total_seconds(const std::vector<GroupTimeline>& groups) {
    double seconds = 0.0;
    for (const GroupTimeline& group : groups) seconds = std::max(seconds, group.written);
    return seconds;
}

LayerPlan plan_layers(const PlannedWork& work, const World& world, const Rates& rates,
                      std::optional<std::int64_t> groups) {
    const int blocks = work.graph->blocks;
    const int most = std::min(world.size(), blocks);
    if (groups && *groups > most) {
        throw BadInput(
            "compute.layer_groups: {} groups are more than the {} blocks of the model or the {} ranks of the "
            "job "
            "can fill: choose at most {}, or auto",
            *groups, blocks, world.size(), most);
    }
    std::optional<LayerPlan> best;
    double best_seconds = 0.0;
    for (int count = groups ? static_cast<int>(*groups) : 1; count <= (groups ? *groups : most); ++count) {
        std::optional<LayerPlan> plan = plan_groups(work, world, rates, count);
        if (!plan) continue;
        const double seconds = total_seconds(simulate(work, world, rates, *plan));
        if (best && seconds > kWorthMoreGroups * best_seconds) continue;
        best = std::move(plan);
        best_seconds = seconds;
    }
    if (best) return *best;
    throw BadInput(
        "not one block with its Hessians ({:.2f} GB) fits the memory of every rank ({:.2f} GB free on the "
        "fullest): use fewer ranks a host, hosts with more memory, or lower calibration.sequences",
        static_cast<double>(bytes_of_block(work)) * 1e-9,
        static_cast<double>(*std::min_element(world.memory.begin(), world.memory.end())) * 1e-9);
}

LayerPlan row_groups(const World& world, std::optional<std::int64_t> groups) {
    if (groups && *groups > world.size()) {
        throw BadInput("compute.layer_groups: {} groups are more than the {} ranks of the job", *groups,
                       world.size());
    }
    return {form_groups(world.hosts, static_cast<int>(groups.value_or(world.host_count()))), {}, false};
}

LayerPlan layers_of(std::span<const PreparedJob> outputs, const World& world, const Backend& backend) {
    const PreparedJob& job = outputs.front();
    const std::optional<std::int64_t>& groups = job.spec.compute.layer_groups;
    if (job.spec.quantization.propagate == "quantized") return row_groups(world, groups);
    if (!job.spec.calibration.hessians.empty()) {
        return plan_without_stream(world.hosts, job.graph.blocks + (job.head ? 1 : 0));
    }
    LayerPlan plan = plan_layers(planned_work(outputs, backend), world, usual_rates(backend.name()), groups);
    if (job.head) add_head(plan, job.graph.blocks);
    return plan;
}

LayerMemory layer_memory(const PlannedWork& work, const LayerPlan& plan, int rank) {
    const auto group = static_cast<std::size_t>(plan.group_of(rank));
    std::uint64_t most = 0;
    for (const auto& sweep : plan.sweeps) {
        const BlockRange& range = sweep[group];
        const bool head = !range.empty() && range.end > work.graph->blocks;
        most =
            std::max(most, static_cast<std::uint64_t>(range.count() - (head ? 1 : 0)) * bytes_of_block(work) +
                               (head ? bytes_of_head(work) : 0));
    }
    const double tokens = load_of(work, plan.index_of(rank), plan.groups[group].size()).tokens;
    return {most,
            HiddenStream::bytes(work.graph->hidden_size, static_cast<std::int64_t>(tokens),
                                limits_of(work.shards).tokens, plan.sweeps.size() > 1 && group == 0,
                                work.activation),
            scratch_bytes(work, group == 0)};
}

}  // namespace quantmill
