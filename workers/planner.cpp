#include "workers/planner.h"

#include <algorithm>
#include <cmath>
#include <future>
#include <optional>
#include <random>

#include "jobs/text.h"
#include "pipeline/gptq_solver.h"
#include "pipeline/hessian.h"
#include "pipeline/model_card.h"
#include "pipeline/output_directory.h"
#include "pipeline/refinement.h"
#include "pipeline/stopwatch.h"
#include "workers/bit_choice.h"
#include "workers/calibration_batches.h"
#include "workers/checkpoint_output.h"
#include "workers/forecast.h"
#include "workers/layer_solves.h"
#include "workers/placement.h"

namespace quantmill {
namespace {

// What copies between a host and its GPUs usually reach.
constexpr double kHostCopyBytesPerSecond = 2e10;

std::string last_part(const std::string& name) { return name.substr(name.rfind('.') + 1); }

PlannedModel describe_model(const PreparedJob& job) {
    PlannedModel model;
    model.name = base_model_name(job.spec.model);
    model.family = job.graph.family;
    model.architecture = job.graph.architecture;
    model.dtype = job.reader.find(job.graph.embedding).dtype;
    model.blocks = job.graph.blocks;
    for (const auto& [name, tensor] : job.reader.tensors()) model.parameters += tensor.count();
    model.bytes = job.reader.total_bytes();
    model.files = static_cast<std::int64_t>(job.reader.files().size());
    return model;
}

std::string scheme_text(const GptqOptions& options) {
    const QuantizationGrid& grid = options.grid;
    const std::string_view search = grid.search == ScaleSearch::mse       ? ", mse search of scales"
                                    : grid.search == ScaleSearch::hessian ? ", hessian search of scales"
                                                                          : "";
    return fmt::format("{} bits, group_size {}, {}{}{}{}{}{}", grid.bits, grid.group_size,
                       grid.sym ? "symmetric" : "asymmetric", options.desc_act ? ", desc_act" : "",
                       options.act_group_aware ? ", act_group_aware" : "",
                       options.static_groups ? ", static_groups" : "", search,
                       grid.signed_scales ? ", signed scales" : "");
}

// The scheme that most linears have, and how many have others.
std::string describe_scheme(const PreparedJob& job) {
    std::int64_t other = 0, quantized = 0, all = 0;
    for (const Stage& stage : job.graph.stages) {
        all += static_cast<std::int64_t>(stage.group.linears.size()) * job.graph.blocks;
    }
    for_each_quantized(job.graph, job.scheme,
                       [&](int block, std::size_t, const LinearGroup& group, const GptqOptions& options) {
                           if (block == job.graph.blocks) return;
                           const auto linears = static_cast<std::int64_t>(group.linears.size());
                           quantized += linears;
                           if (options != job.scheme.usual()) other += linears;
                       });
    std::string text = scheme_text(job.scheme.usual());
    if (const auto& target = job.spec.quantization.target_bits) {
        text = fmt::format("{} bits a weight on average, group_size {}, {}; bits chosen from measured losses",
                           *target, job.scheme.usual().grid.group_size,
                           job.scheme.usual().grid.sym ? "symmetric" : "asymmetric");
        other = 0;
    }
    if (other > 0) text += fmt::format("; {} of {} linears by other rules", other, all);
    if (quantized < all) text += fmt::format("; {} linears left as they are", all - quantized);
    if (job.scheme.quantizes_head()) {
        text += "; lm_head " + scheme_text(*job.scheme.options_at(job.graph.blocks, 0));
    }
    return text;
}

PlannedQuantization describe_quantization(const PreparedJob& job) {
    PlannedQuantization quantization;
    quantization.scheme = describe_scheme(job);
    for (const Stage& stage : job.graph.stages) {
        PlannedGroup group{stage.group.name, {}, stage.group.rows(), stage.group.columns()};
        for (const Linear& linear : stage.group.linears) group.linears.push_back(last_part(linear.name));
        quantization.groups.push_back(std::move(group));
    }
    for_each_quantized(job.graph, job.scheme,
                       [&](int, std::size_t, const LinearGroup& group, const GptqOptions&) {
                           quantization.linears += static_cast<std::int64_t>(group.linears.size());
                           quantization.parameters += group.rows() * group.columns();
                       });
    quantization.left_alone = {"embedding"};
    if (!job.scheme.quantizes_head()) quantization.left_alone.emplace_back("lm_head");
    quantization.left_alone.emplace_back("norms");
    return quantization;
}

PlannedCalibration describe_calibration(const PreparedJob& job) {
    PlannedCalibration calibration;
    calibration.tokens = job.spec.calibration.tokens.string();
    calibration.sequences = static_cast<std::int64_t>(job.calibration.sequences.size());
    calibration.longest = limits_of(job.shards).length;
    calibration.shards = static_cast<std::int64_t>(job.shards.size());
    for (const BatchShard& shard : job.shards) {
        calibration.token_count += shard.tokens();
        calibration.micro_batches += static_cast<std::int64_t>(shard.micro_batches.size());
    }
    return calibration;
}

bool propagates_error(const PreparedJob& job) { return job.spec.quantization.error_propagation_alpha > 0.0; }

// What a rank holds at once in one stage of a block, beside activations and weights.
struct StageMemory {
    std::uint64_t hessian = 0;  // sum and factor
    std::uint64_t cross = 0;    // the same of (X − X̃)ᵀX̃, with error propagation
    std::uint64_t solve = 0;    // beyond these: rows, codes and workspace, or what the factorization takes
    std::uint64_t total() const { return hessian + cross + solve; }
};

// Beside weights, codes and the damped Hessian: with act-order all of them in the order of the walk.
std::uint64_t memory_of_refinement(const GptqOptions& options, const Backend& backend, std::int64_t rows,
                                   std::int64_t columns) {
    if (!refines(options)) return 0;
    const std::uint64_t order =
        natural_groups(options) ? 0 : static_cast<std::uint64_t>(rows * columns * 5 + columns * columns * 4);
    return order + backend.refine_workspace(rows, columns, grid_for(options.grid, columns));
}

StageMemory memory_of_solve(const GptqOptions& options, const Backend& backend, const LinearGroup& group,
                            int world_size) {
    const std::int64_t rows = solve_ranges(group.rows(), world_size).front().count();
    const std::int64_t columns = group.columns();
    const QuantizationGrid grid = grid_for(options.grid, columns);
    const std::uint64_t mine = static_cast<std::uint64_t>(rows * columns) * sizeof(float);
    const bool ordered = options.desc_act || options.act_group_aware;
    // Weights, codes, scales and zeros in the order of the walk.
    const std::uint64_t order =
        ordered ? mine + mine / sizeof(float) + static_cast<std::uint64_t>(3 * rows * grid.groups(columns))
                : 0;
    const std::uint64_t square = static_cast<std::uint64_t>(columns * columns) * sizeof(float);
    const std::uint64_t natural = ordered ? square : 0;
    const auto codes = static_cast<std::uint64_t>(group.rows() * (columns + 3 * grid.groups(columns)));
    const std::uint64_t walk = order + backend.solve_workspace(rows, columns, grid);
    std::uint64_t solve =
        mine + codes + std::max({walk, mine, memory_of_refinement(options, backend, rows, columns)});
    StageMemory memory{.hessian = HessianAccumulator::bytes(columns)};
    if (options.error_propagation_alpha > 0.0) {
        solve = mine + std::max(solve, mine + codes + backend.propagate_workspace(rows, columns));
        memory.cross = CrossAccumulator::bytes(columns);
    }
    if (refines(options)) solve += square;  // the damped Hessian
    memory.solve = std::max(solve, natural + backend.factor_workspace(columns));
    // Of the cross products only their finished matrix is left by then.
    const std::uint64_t freed = memory.cross == 0 ? 0 : memory.cross - square;
    memory.solve -= std::min(memory.solve, freed);
    return memory;
}

// Of the weights that the original path multiplies with: at most those between two changes of the residual
// stream. Without true_sequential they are those of the quantized path.
std::uint64_t original_weights(const PreparedJob& job, std::uint64_t element) {
    if (!propagates_error(job) || !job.spec.quantization.true_sequential) return 0;
    std::int64_t most = 0, held = 0;
    for (const Stage& stage : job.graph.stages) {
        held += stage.group.rows() * stage.group.columns();
        most = std::max(most, held);
        if (stage.residual) held = 0;
    }
    return static_cast<std::uint64_t>(most) * element;
}

// The most that any block's stage takes; nothing where none is quantized.
StageMemory memory_of_stage(const PreparedJob& job, const Backend& backend, std::size_t stage,
                            int world_size) {
    StageMemory most;
    const LinearGroup& group = job.graph.stages[stage].group;
    for (int block = 0; block < job.graph.blocks; ++block) {
        const std::optional<GptqOptions>& options = job.scheme.options_at(block, stage);
        if (!options) continue;
        const StageMemory memory = memory_of_solve(*options, backend, group, world_size);
        most = {memory.hessian, memory.cross, std::max(most.solve, memory.solve)};
    }
    return most;
}

// What a rank holds at most, by purpose, without its calibration activations.
// `row_ranks`: those that share the rows.
std::vector<NamedBytes> fixed_memory(const PreparedJob& job, const Backend& backend, int world_size,
                                     int row_ranks) {
    const ModelGraph& graph = job.graph;
    const QuantizationSpec& spec = job.spec.quantization;
    const std::uint64_t stored =
        size_of(dtype_from_safetensors(job.reader.find(graph.embedding).dtype).value_or(DType::f32));
    const std::uint64_t computed = size_of(backend.activation_dtype());
    StageMemory peak;
    std::uint64_t hessians = 0, crosses = 0;
    for (std::size_t stage = 0; stage < graph.stages.size(); ++stage) {
        const StageMemory memory = memory_of_stage(job, backend, stage, row_ranks);
        hessians += memory.hessian;
        crosses += memory.cross;
        if (memory.total() > peak.total()) peak = memory;
    }
    if (!spec.true_sequential) peak.hessian = hessians, peak.cross = crosses;
    const auto block = static_cast<std::uint64_t>(graph.block_parameters());
    const std::uint64_t weights =
        block * (spec.true_sequential ? std::max(stored, computed) : stored + computed);
    const std::uint64_t share = block * stored / static_cast<std::uint64_t>(world_size);
    const std::uint64_t embedding = static_cast<std::uint64_t>(graph.vocab_size * graph.hidden_size) * stored;
    const std::uint64_t in_block = weights + peak.total();
    const std::int64_t batch = limits_of(job.shards).tokens;
    std::vector<NamedBytes> memory{
        {"weights of a block", weights},
        {"read ahead", share * (backend.host_memory() ? 2 : 1)},  // as read, and as the backend's
        {"forward scratch", BlockForward::scratch_bytes(graph, batch, backend.activation_dtype())},
        {"Hessian and factor", peak.hessian},
        {"rows being solved", peak.solve}};
    if (propagates_error(job)) {
        const auto norm = static_cast<std::uint64_t>(batch * graph.hidden_size) * computed;
        memory.push_back({"error of the inputs, with the original path's",
                          peak.cross + norm + original_weights(job, computed)});
    }
    if (embedding > in_block) memory.push_back({"embedding, before the blocks", embedding - in_block});
    if (job.scheme.quantizes_head()) {
        const StageMemory solve = memory_of_solve(*job.scheme.options_at(graph.blocks, 0), backend,
                                                  graph.head.front().group, row_ranks);
        const std::uint64_t held = std::max(in_block, embedding);
        const std::uint64_t head = embedding + solve.total();
        if (head > held) memory.push_back({"lm_head, after the blocks", head - held});
    }
    return memory;
}

// What a rank holds, and of how many tokens on the device, when it recomputes what stages carry or not.
PlannedRank with_activations(const PreparedJob& job, const Backend& backend, int world_size, int row_ranks,
                             PlannedRank rank, bool recomputes) {
    rank.recomputes = recomputes;
    const bool keeps_carried = activations_of(job.spec, rank).keeps_carried;
    const std::int64_t batch = limits_of(job.shards).tokens;
    const std::uint64_t paths = propagates_error(job) ? 2 : 1;
    const auto bytes_of = [&](std::int64_t tokens) -> std::uint64_t {
        return paths *
               CalibrationBatches::bytes(job.graph, tokens, backend.activation_dtype(), keeps_carried);
    };
    rank.memory = fixed_memory(job, backend, world_size, row_ranks);
    if (!keeps_carried) {
        const auto width = static_cast<std::uint64_t>(batch * BlockForward::carried_width(job.graph));
        rank.memory.push_back(
            {"inputs of a stage, a micro-batch", paths * width * size_of(backend.activation_dtype())});
    }
    rank.device_tokens = rank.tokens;
    if (!backend.host_memory()) {
        rank.host_memory = 2 * rank.memory.at(1).bytes + CheckpointOutput::kMostWaiting;
        const std::uint64_t slots = bytes_of(2 * batch);
        const std::uint64_t fixed = total_memory(rank);
        if (fixed + bytes_of(rank.tokens) > rank.free_memory) {
            rank.memory.push_back({"activations on their way from and to the host", slots});
            const std::uint64_t left = rank.free_memory - std::min(rank.free_memory, fixed + slots);
            rank.device_tokens = static_cast<std::int64_t>(left / bytes_of(1));
            rank.host_memory += bytes_of(rank.tokens - rank.device_tokens);
        }
    }
    rank.memory.insert(rank.memory.begin(),
                       {keeps_carried ? "calibration activations" : "hidden states of the calibration tokens",
                        bytes_of(rank.device_tokens)});
    return rank;
}

// Decides where the activations of a rank's tokens live: on the device, in the host's memory, or nowhere.
void place_activations(const PreparedJob& job, const Backend& backend, int world_size, int row_ranks,
                       PlannedRank& rank) {
    const auto placed = [&](bool recomputes) {
        return with_activations(job, backend, world_size, row_ranks, rank, recomputes);
    };
    const std::string& wanted = job.spec.compute.activations;
    const PlannedRank kept = placed(false);
    const bool fits = total_memory(kept) <= kept.free_memory && kept.host_memory <= kept.free_host_memory;
    rank = wanted == "recompute" || (wanted == "auto" && !fits) ? placed(true) : kept;
}

// Batch shards of a rank: in its group when groups stream, else among all.
std::vector<std::int64_t> shards_of(const PreparedJob& job, const World& world, const LayerPlan& layers,
                                    int rank) {
    std::vector<std::int64_t> owned;
    const auto count = static_cast<std::int64_t>(job.shards.size());
    const RowRange range = shards_of_rank(count, rank, world.size());
    for (std::int64_t shard = 0; shard < count; ++shard) {
        const std::size_t size = layers.groups[static_cast<std::size_t>(layers.group_of(rank))].size();
        const bool own = layers.streams
                             ? shard_owner(static_cast<std::size_t>(shard), size) == layers.index_of(rank)
                             : range.begin <= shard && shard < range.end;
        if (own) owned.push_back(shard);
    }
    return owned;
}

std::vector<NamedBytes> memory_of_groups(const PreparedJob& job, const Backend& backend,
                                         const LayerPlan& layers, int rank) {
    const LayerMemory memory = layer_memory(planned_work(std::span(&job, 1), backend), layers, rank);
    return {{"blocks of its group, with their Hessians", memory.blocks},
            {"hidden states on their way", memory.hidden},
            {"rows being solved and scratch", memory.scratch}};
}

// The rank that writes each output file.
std::vector<int> writers_of_files(const PreparedJob& job, const World& world, const LayerPlan& layers,
                                  const Backend& backend) {
    if (job.spec.quantization.propagate == "original") {
        return writers_of(job.graph, backend.name(), layers, job.layout);
    }
    std::vector<int> writers(job.layout.shards.size());
    for (int rank = 0; rank < world.size(); ++rank) {
        for (const std::size_t file : output_shards_of_rank(writers.size(), rank, world.size())) {
            writers[file] = rank;
        }
    }
    return writers;
}

std::vector<PlannedRank> describe_ranks(const PreparedJob& job, const Backend& backend, const World& world,
                                        const LayerPlan& layers, const std::vector<int>& writers) {
    const bool original = job.spec.quantization.propagate == "original";
    std::vector<PlannedRank> ranks;
    for (int rank = 0; rank < world.size(); ++rank) {
        PlannedRank planned;
        planned.rank = rank;
        planned.host = world.hosts[static_cast<std::size_t>(rank)];
        planned.free_memory = world.memory[static_cast<std::size_t>(rank)];
        planned.free_host_memory = world.host_memory[static_cast<std::size_t>(rank)];
        planned.shards = shards_of(job, world, layers, rank);
        for (const std::int64_t s : planned.shards) {
            const BatchShard& shard = job.shards[static_cast<std::size_t>(s)];
            planned.tokens += shard.tokens();
            for (const MicroBatch& batch : shard.micro_batches) planned.sequences += batch.sequences.count();
        }
        const auto& group = layers.groups[static_cast<std::size_t>(layers.group_of(rank))];
        for (const Stage& stage : job.graph.stages) {
            const auto ranges = solve_ranges(stage.group.rows(), static_cast<int>(group.size()));
            planned.rows.push_back(original
                                       ? stage.group.rows()
                                       : ranges[static_cast<std::size_t>(layers.index_of(rank))].count());
        }
        for (std::size_t file = 0; file < writers.size(); ++file) {
            if (writers[file] == rank) planned.output_files.push_back(static_cast<std::int64_t>(file));
        }
        if (original) {
            planned.device_tokens = planned.tokens;
            planned.memory = memory_of_groups(job, backend, layers, rank);
        } else {
            place_activations(job, backend, world.size(), static_cast<int>(group.size()), planned);
        }
        ranks.push_back(std::move(planned));
    }
    return ranks;
}

// Numbers like those of a model: products of zeros take less power, so that the device's clock stays higher
// than it will in the run.
void fill_with_noise(Backend& backend, TensorView tensor) {
    constexpr std::int64_t kRows = 64;
    const std::int64_t rows = tensor.shape()[0], columns = tensor.shape()[1];
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> values(static_cast<std::size_t>(kRows * columns));
    for (float& value : values) value = normal(random);
    Tensor noise = backend.empty({kRows, columns}, DType::f32, "rate measurement");
    backend.copy_from_host(values.data(), noise);
    for (std::int64_t row = 0; row < rows; row += kRows) {
        const std::int64_t count = std::min(kRows, rows - row);
        backend.convert(noise.view().rows(0, count), tensor.rows(row, row + count));
    }
}

// GFLOP/s of the slowest rank in products of the model's own shape, all ranks at once as in the run.
double measure_gflops(const ModelGraph& graph, Control& control, Backend& backend) {
    const Linear& linear = graph.stages.front().group.linears.front();
    const std::int64_t tokens = backend.micro_batch_tokens();
    Tensor x = backend.empty({tokens, linear.columns}, backend.activation_dtype(), "rate measurement");
    Tensor w = backend.empty({linear.rows, linear.columns}, backend.activation_dtype(), "rate measurement");
    Tensor out = backend.empty({tokens, linear.rows}, backend.activation_dtype(), "rate measurement");
    fill_with_noise(backend, x);
    fill_with_noise(backend, w);
    const auto product = [&] {
        backend.linear(x, w, {}, out);
        backend.synchronize();
    };
    product();
    control.barrier();
    const Stopwatch watch;
    int repetitions = 0;
    for (; watch.seconds() < 0.3; ++repetitions) product();
    const double flops = 2.0 * static_cast<double>(tokens * linear.rows * linear.columns);
    const double mine = flops * repetitions / watch.seconds() * 1e-9;
    return static_cast<double>(-control.all_max({-std::llround(mine * 1e3)}).front()) * 1e-3;
}

// Bytes a second at which the slowest rank reads and checks weights while all do.
double measure_reading(const PreparedJob& job, Control& control) {
    constexpr std::size_t kThreads = 8, kPiece = std::size_t{16} << 20U;
    std::vector<std::string> names;
    for (const auto& [name, tensor] : job.reader.tensors()) {
        if (tensor.bytes() >= kPiece) names.push_back(name);
    }
    if (names.empty()) return 0.0;
    control.barrier();
    const Stopwatch watch;
    const auto first = static_cast<std::size_t>(control.rank()) * kThreads;
    std::vector<std::future<std::size_t>> threads;
    for (std::size_t t = 0; t < kThreads; ++t) {
        threads.push_back(std::async(std::launch::async, [&, t] {
            const std::string& name = names[(first + t) % names.size()];
            const StoredTensor& tensor = job.reader.find(name);
            std::vector<std::byte> piece(kPiece);
            std::size_t at = 0;
            for (; at + kPiece <= tensor.bytes() && (at == 0 || watch.seconds() < 0.2); at += kPiece) {
                job.reader.read(name, at, piece.data(), kPiece);
                require_finite(tensor, at, piece.data(), kPiece, job.reader.file_of(name).string());
            }
            return at;
        }));
    }
    std::size_t bytes = 0;
    for (auto& thread : threads) bytes += thread.get();
    const double mine = static_cast<double>(bytes) / watch.seconds();
    return static_cast<double>(-control.all_max({-std::llround(mine)}).front());
}

// Elements a token that a block moves between device and host when the token's activations are kept there.
std::int64_t streamed_elements(const ModelGraph& graph, bool keeps_carried, bool original_path) {
    std::int64_t elements = 0;
    const auto count = [&](const StateUse& use) {
        elements += use.reads_carried + use.writes_carried;
        elements += graph.hidden_size * ((use.reads_hidden ? 1 : 0) + (use.writes_hidden ? 1 : 0));
    };
    for (std::size_t stage = 0; stage < graph.stages.size(); ++stage) {
        const std::size_t first = first_of_pass(graph, stage, keeps_carried);
        count(use_of_input(graph, first));
        if (keeps_result(graph, stage + 1, keeps_carried)) count(use_of_stages(graph, first, stage + 1));
        if (original_path) count(use_of_original(graph, stage, stage + 1, keeps_carried));
    }
    return elements;
}

// Operations a token of a block's forward pass, `attention`: of its attention. With what is recomputed, every
// stage whose input is carried runs those before it once more.
double forward_flops(const ModelGraph& graph, double attention, bool keeps_carried) {
    double flops = 2.0 * static_cast<double>(graph.block_parameters()) + attention;
    for (std::size_t stage = 0; stage < graph.stages.size(); ++stage) {
        const std::size_t first = first_of_pass(graph, stage, keeps_carried);
        for (std::size_t before = first; before < stage; ++before) {
            const LinearGroup& group = graph.stages[before].group;
            flops += 2.0 * static_cast<double>(group.rows() * group.columns());
            if (graph.stages[before + 1].input == StageInput::attention) flops += attention;
        }
    }
    return flops;
}

// What activations that do not fit cost beside the forecast: operations that are repeated, and copies between
// device and host as far as the passes over their own tokens do not hide them.
void add_cost_of_activations(const PreparedJob& job, const Rates& rates, const Backend& backend, Plan& plan,
                             PlannedTime& time) {
    const double before = time.total();
    const bool true_sequential = job.spec.quantization.true_sequential;
    std::int64_t streamed = 0;  // tokens of the rank that keeps most on its host
    double share = 0.0;         // of its tokens
    bool recomputes = false;    // some rank
    for (const PlannedRank& rank : plan.ranks) {
        if (const std::int64_t tokens = rank.tokens - rank.device_tokens; tokens > streamed) {
            streamed = tokens;
            share = static_cast<double>(tokens) / static_cast<double>(rank.tokens);
        }
        recomputes = recomputes || rank.recomputes;
    }
    if (recomputes && true_sequential) {
        const Attention& attention = job.graph.attention;
        const double flops =
            2.0 * static_cast<double>(plan.calibration.longest * attention.heads * attention.head_dim);
        const double as_products = flops * rates.forward / rates.attention;
        time.forward *=
            forward_flops(job.graph, as_products, false) / forward_flops(job.graph, as_products, true);
    }
    const double copied = static_cast<double>(job.graph.blocks * streamed) *
                          static_cast<double>(size_of(backend.activation_dtype())) *
                          static_cast<double>(streamed_elements(job.graph, !recomputes && true_sequential,
                                                                propagates_error(job)));
    time.io += std::max(0.0, copied / kHostCopyBytesPerSecond - share * (time.forward + time.hessian));
    plan.layers.seconds += time.total() - before;
}

// What quantization.target_bits of one output runs before the job itself.
struct Measurement {
    std::vector<PreparedJob> jobs;
    LayerPlan layers;
    PlannedWork work;
};

std::vector<Measurement> measurements_of(std::span<const PreparedJob> outputs, const World& world,
                                         const Backend& backend) {
    std::vector<Measurement> all;
    for (const PreparedJob& output : outputs) {
        if (!output.spec.quantization.target_bits) continue;
        Measurement& measurement = all.emplace_back();
        measurement.jobs = jobs_to_measure(output);
        measurement.layers = layers_of(measurement.jobs, world, backend);
        measurement.work = planned_work(measurement.jobs, backend);
        measurement.work.written_bytes = 0.0;
    }
    return all;
}

// They are over when the job begins, so that only what they take beyond it counts.
void add_measurements(std::span<const Measurement> measurements, std::vector<PlannedRank>& ranks) {
    for (PlannedRank& rank : ranks) {
        std::uint64_t most = total_memory(rank);
        for (const Measurement& measurement : measurements) {
            most = std::max(most, layer_memory(measurement.work, measurement.layers, rank.rank).total());
        }
        if (const std::uint64_t job = total_memory(rank); most > job)
            rank.memory.push_back({"measuring losses for target_bits, before the rest", most - job});
    }
}

double measuring_seconds(std::span<const Measurement> measurements, const World& world, const Rates& rates) {
    double seconds = 0.0;
    for (const Measurement& measurement : measurements) {
        seconds += forecast_original(measurement.work, world, rates, measurement.layers).time.total();
    }
    return seconds;
}

// What speaks against storing a linear so, or serving it; each said once, whatever blocks it concerns.
class Obstacles {
public:
    Obstacles(const OutputSpec& output, Plan& plan)
        : format_(gptq_format_from(output.format)),
          shards_(output.tensor_parallel),
          problems_(plan.problems),
          unservable_(output.allow_unservable ? plan.warnings : plan.problems) {}

    void find(const Stage& stage, const GptqOptions& options) {
        for (const Linear& linear : stage.group.linears) {
            const QuantizationGrid grid = grid_for(options.grid, linear.columns);
            if (const auto obstacle = gptq_obstacle(linear.rows, linear.columns, grid, format_);
                !obstacle.empty()) {
                add(problems_, fmt::format("{}: {}", linear.name, obstacle));
            }
            if (options.grid.group_size > 0) find_in_width(stage, linear, grid);
            if (!stage.residual && linear.rows % (shards_ * 32) != 0 && shards_ > 1) {
                add(unservable_,
                    fmt::format("{}: its {} rows cannot be split over tensor_parallel {} in whole "
                                "32-bit words: vLLM and SGLang refuse it",
                                linear.name, linear.rows, shards_));
            }
        }
    }

private:
    // Inner widths (of linears that feed the residual) are split by columns, the others by rows.
    void find_in_width(const Stage& stage, const Linear& linear, const QuantizationGrid& grid) {
        const std::int64_t unit = stage.residual ? shards_ * grid.group_size : grid.group_size;
        if (linear.columns % unit == 0) return;
        add(unservable_,
            fmt::format(
                "{}: its width {} is not a multiple of {}group_size {}: vLLM, SGLang and the Marlin and "
                "ExLlama "
                "kernels refuse it; choose another quantization.group_size, or output.allow_unservable: true",
                linear.name, linear.columns,
                stage.residual && shards_ > 1 ? fmt::format("tensor_parallel {} x ", shards_) : "",
                grid.group_size));
    }

    static void add(std::vector<std::string>& list, const std::string& text) {
        if (std::find(list.begin(), list.end(), text) == list.end()) list.push_back(text);
    }

    GptqFormat format_;
    std::int64_t shards_;
    std::vector<std::string>&problems_, &unservable_;
};

void find_obstacles(const PreparedJob& job, Plan& plan) {
    Obstacles obstacles(job.spec.output, plan);
    for_each_quantized(job.graph, job.scheme,
                       [&](int block, std::size_t stage, const LinearGroup&, const GptqOptions& options) {
                           obstacles.find(job.graph.stages_of(block)[stage], options);
                       });
}

// What rank 0, which will prepare the output directory, has against it.
void find_output_obstacle(const PreparedJob& job, Control& control, bool overwrite, Plan& plan) {
    std::string obstacle;
    if (control.rank() == 0) {
        try {
            check_output_directory(job.spec.output.directory, overwrite, job.spec.model);
        } catch (const BadInput& error) {
            obstacle = error.what();
        }
    }
    obstacle = control.broadcast(obstacle, 0);
    if (!obstacle.empty()) plan.problems.push_back(obstacle);
}

void find_warnings(const PreparedJob& job, Plan& plan) {
    bool asymmetric = false, mixed = false;
    int bits = 8;
    for_each_quantized(job.graph, job.scheme,
                       [&](int block, std::size_t, const LinearGroup&, const GptqOptions& options) {
                           asymmetric = asymmetric || !options.grid.sym;
                           mixed = mixed || (block < job.graph.blocks && options != job.scheme.usual());
                           bits = std::min(bits, options.grid.bits);
                       });
    if (asymmetric) {
        plan.warnings.emplace_back(
            "sym: false is loaded by GPTQModel and transformers; vLLM and most SGLang kernels "
            "take symmetric checkpoints only");
    }
    if (bits < 4) {
        plan.warnings.push_back(
            fmt::format("{} bits load in GPTQModel and SGLang; vLLM's gptq loader takes 4 and 8 bits", bits));
    }
    if (mixed) {
        plan.warnings.emplace_back(
            "linears of different schemes load in GPTQModel, vLLM and SGLang; transformers takes all for "
            "alike "
            "and computes nonsense");
    }
    if (job.scheme.quantizes_head()) {
        plan.warnings.emplace_back(
            "a quantized lm_head loads in GPTQModel, vLLM and SGLang; transformers does not find its "
            "weights");
    }
    std::int64_t widest = 0;
    for (const Stage& stage : job.graph.stages) widest = std::max(widest, stage.group.columns());
    if (plan.calibration.token_count < 2 * widest) {
        plan.warnings.push_back(
            fmt::format("{} calibration tokens are few for Hessians of width {}: expect at least "
                        "{}, better ten times that",
                        plan.calibration.token_count, widest, 2 * widest));
    }
    if (plan.calibration.longest > job.graph.max_positions) {
        plan.warnings.push_back(
            fmt::format("sequences of {} tokens exceed the model's max_position_embeddings {}: set "
                        "calibration.sequence_length",
                        plan.calibration.longest, job.graph.max_positions));
    }
}

void find_shortages(Plan& plan, bool on_device) {
    if (plan.disk_needed > plan.disk_free) {
        plan.problems.push_back(
            fmt::format("output.directory {}: the checkpoint needs {} of disk, {} are free: free at least {} "
                        "there, or choose "
                        "another one",
                        plan.output_directory, bytes_text(plan.disk_needed), bytes_text(plan.disk_free),
                        bytes_text(plan.disk_needed - plan.disk_free)));
    }
    for (const PlannedRank& rank : plan.ranks) {
        if (const std::uint64_t needed = total_memory(rank); needed > rank.free_memory) {
            plan.problems.push_back(fmt::format(
                "rank {} on {} needs {:.2f} GB of {}, {:.2f} GB are free: use more ranks on more {}",
                rank.rank, rank.host, static_cast<double>(needed) * 1e-9,
                on_device ? "device memory" : "memory", static_cast<double>(rank.free_memory) * 1e-9,
                on_device ? "GPUs, or raise compute.device_memory"
                          : "hosts, or lower calibration.sequences or calibration.sequence_length"));
        }
        if (rank.host_memory > rank.free_host_memory) {
            plan.problems.push_back(
                fmt::format("rank {} on {} needs {:.2f} GB of host memory, {:.2f} GB are free: use more "
                            "ranks on more hosts, "
                            "ask for more host memory (Slurm's --mem), or lower calibration.sequences or "
                            "calibration.sequence_length",
                            rank.rank, rank.host, static_cast<double>(rank.host_memory) * 1e-9,
                            static_cast<double>(rank.free_host_memory) * 1e-9));
        }
    }
}

}  // namespace

ActivationPlacement activations_of(const JobSpec& spec, const PlannedRank& rank) {
    // Without true_sequential one pass sees a whole block, so that nothing is carried from pass to pass.
    return {rank.device_tokens, spec.quantization.true_sequential && !rank.recomputes};
}

Plan make_plan(const PreparedJob& job, Control& control, Backend& backend, const std::string& communicator,
               bool measure, bool overwrite, const std::optional<World>& imagined,
               std::span<const PreparedJob> outputs) {
    const World world = imagined ? *imagined : gather_world(control, backend);
    const std::span<const PreparedJob> all = outputs.empty() ? std::span(&job, 1) : outputs;
    const LayerPlan layers = layers_of(all, world, backend);
    const std::vector<int> writers = writers_of_files(job, world, layers, backend);
    Plan plan;
    plan.backend = backend.description();
    plan.communicator = communicator;
    plan.model = describe_model(job);
    plan.quantization = describe_quantization(job);
    plan.calibration = describe_calibration(job);
    plan.output_directory = job.spec.output.directory.string();
    plan.output_format = job.spec.output.format;
    for (std::size_t i = 0; i < job.layout.shards.size(); ++i) {
        const OutputShard& shard = job.layout.shards[i];
        plan.files.push_back({shard.file_name, shard.bytes, writers[i]});
    }
    plan.disk_needed = job.layout.total_bytes() + companion_bytes(job.spec.model);
    plan.disk_reclaimed = reclaimed_bytes(job.spec.output.directory);
    plan.disk_free = free_disk(job.spec.output.directory) + plan.disk_reclaimed;
    plan.ranks = describe_ranks(job, backend, world, layers, writers);
    const std::vector<Measurement> measurements = measurements_of(all, world, backend);
    add_measurements(measurements, plan.ranks);
    const double gflops = measure ? measure_gflops(job.graph, control, backend) : 1.0;
    Rates rates = rates_of(backend.name(), gflops * 1e9);
    if (measure) rates.reading = measure_reading(job, control);
    Forecast expected = forecast(job, planned_work(all, backend), world, rates, layers);
    plan.layers = std::move(expected.layers);
    if (measure) {
        expected.time.gflops = gflops;
        if (job.spec.quantization.propagate == "quantized") {
            add_cost_of_activations(job, rates, backend, plan, expected.time);
        }
        expected.time.measuring = measuring_seconds(measurements, world, rates);
        plan.time = expected.time;
    }
    find_obstacles(job, plan);
    find_output_obstacle(job, control, overwrite, plan);
    find_warnings(job, plan);
    find_shortages(plan, !backend.host_memory());
    return plan;
}

}  // namespace quantmill
