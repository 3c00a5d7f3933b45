#include "workers/planner.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "pipeline/hessian.h"
#include "pipeline/model_card.h"
#include "pipeline/stopwatch.h"
#include "workers/calibration_batches.h"
#include "workers/placement.h"

namespace quantmill {
namespace {

// Shares of the matrix product's rate that other stages were seen to reach on the CPU (bench/RESULTS.md), and
// a disk rate that shared file systems usually keep.
constexpr double kAttentionShare = 0.4;
constexpr double kFactorShare = 0.5;
constexpr double kSolveShare = 0.4;
constexpr double kDiskBytesPerSecond = 5e8;

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

PlannedQuantization describe_quantization(const PreparedJob& job) {
    const QuantizationSpec& spec = job.spec.quantization;
    PlannedQuantization quantization;
    quantization.scheme =
        fmt::format("{} bits, group_size {}, {}{}", spec.bits, spec.group_size,
                    spec.sym ? "symmetric" : "asymmetric", spec.desc_act ? ", desc_act" : "");
    for (const Stage& stage : job.graph.stages) {
        PlannedGroup group{stage.group.name, {}, stage.group.rows(), stage.group.columns()};
        for (const Linear& linear : stage.group.linears) group.linears.push_back(last_part(linear.name));
        quantization.linears += static_cast<std::int64_t>(group.linears.size()) * job.graph.blocks;
        quantization.groups.push_back(std::move(group));
    }
    quantization.parameters = job.graph.block_parameters() * job.graph.blocks;
    quantization.left_alone = {"embedding", "lm_head", "norms"};
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

// Upper bounds of what a rank holds at once, by purpose.
std::vector<NamedBytes> memory_of(const PreparedJob& job, const Backend& backend, std::int64_t tokens,
                                  int world_size) {
    const ModelGraph& graph = job.graph;
    const DType activation = backend.activation_dtype();
    const std::uint64_t stored =
        size_of(dtype_from_safetensors(job.reader.find(graph.embedding).dtype).value_or(DType::f32));
    std::uint64_t widest = 0, hessians = 0, solve = 0, codes = 0;
    for (const Stage& stage : graph.stages) {
        const auto columns = static_cast<std::uint64_t>(stage.group.columns());
        const std::uint64_t hessian = HessianAccumulator::bytes(stage.group.columns());
        widest = std::max(widest, hessian);
        hessians += hessian;
        const auto rows =
            static_cast<std::uint64_t>(solve_ranges(stage.group.rows(), world_size).back().count());
        solve = std::max(solve, rows * columns * 2 * sizeof(float));
        codes = std::max(codes, static_cast<std::uint64_t>(stage.group.rows()) * columns);
    }
    const auto block = static_cast<std::uint64_t>(graph.block_parameters());
    const std::uint64_t embedding = static_cast<std::uint64_t>(graph.vocab_size * graph.hidden_size) * stored;
    return {{"calibration activations", CalibrationBatches::bytes(graph, tokens, activation)},
            {"weights of a block", block * (stored + size_of(activation))},
            {"read ahead", block * stored / static_cast<std::uint64_t>(world_size)},
            {"Hessian and factor", job.spec.quantization.true_sequential ? widest : hessians},
            {"rows being solved", solve + codes},
            {"embedding or scratch",
             std::max<std::uint64_t>(
                 embedding, BlockForward::scratch_bytes(graph, limits_of(job.shards).tokens, activation))}};
}

std::vector<PlannedRank> describe_ranks(const PreparedJob& job, Control& control, const Backend& backend) {
    const nlohmann::json mine{
        control.host(),
        backend.free_memory() / static_cast<std::size_t>(backend.host_memory() ? control.local_size() : 1)};
    const std::vector<std::string> facts = control.all_gather(mine.dump());
    std::vector<PlannedRank> ranks;
    for (int rank = 0; rank < control.size(); ++rank) {
        PlannedRank planned;
        planned.rank = rank;
        const auto fact = nlohmann::json::parse(facts[static_cast<std::size_t>(rank)]);
        planned.host = fact.at(0).get<std::string>();
        planned.free_memory = fact.at(1).get<std::uint64_t>();
        std::int64_t tokens = 0;
        const RowRange shards =
            shards_of_rank(static_cast<std::int64_t>(job.shards.size()), rank, control.size());
        for (std::int64_t s = shards.begin; s < shards.end; ++s) {
            const BatchShard& shard = job.shards[static_cast<std::size_t>(s)];
            planned.shards.push_back(s);
            tokens += shard.tokens();
            for (const MicroBatch& batch : shard.micro_batches) planned.sequences += batch.sequences.count();
        }
        for (const Stage& stage : job.graph.stages) {
            const auto ranges = solve_ranges(stage.group.rows(), control.size());
            planned.rows.push_back(ranges[static_cast<std::size_t>(rank)].count());
        }
        for (const std::size_t file : output_shards_of_rank(job.layout.shards.size(), rank, control.size())) {
            planned.output_files.push_back(static_cast<std::int64_t>(file));
        }
        planned.memory = memory_of(job, backend, tokens, control.size());
        ranks.push_back(std::move(planned));
    }
    return ranks;
}

// GFLOP/s of the slowest rank in products of the model's own shape, all ranks at once as in the run.
double measure_gflops(const ModelGraph& graph, Control& control, Backend& backend) {
    const Linear& linear = graph.stages.front().group.linears.front();
    Tensor x =
        backend.empty({kMicroBatchTokens, linear.columns}, backend.activation_dtype(), "rate measurement");
    Tensor w = backend.empty({linear.rows, linear.columns}, backend.activation_dtype(), "rate measurement");
    Tensor out =
        backend.empty({kMicroBatchTokens, linear.rows}, backend.activation_dtype(), "rate measurement");
    backend.zero(x);
    backend.zero(w);
    const auto product = [&] {
        backend.linear(x, w, {}, out);
        backend.synchronize();
    };
    product();
    control.barrier();
    const Stopwatch watch;
    int repetitions = 0;
    for (; watch.seconds() < 0.3; ++repetitions) product();
    const double flops = 2.0 * static_cast<double>(kMicroBatchTokens * linear.rows * linear.columns);
    const double mine = flops * repetitions / watch.seconds() * 1e-9;
    return static_cast<double>(-control.all_max({-std::llround(mine * 1e3)}).front()) * 1e-3;
}

// docs/algorithm.md, "Costs": operations over the measured rate.
PlannedTime estimate_time(const PreparedJob& job, Control& control, Backend& backend, const Plan& plan) {
    PlannedTime time;
    time.gflops = measure_gflops(job.graph, control, backend);
    const double rate = time.gflops * 1e9;
    const double blocks = job.graph.blocks;
    const double ranks = control.size();
    double busiest = 0.0;  // tokens of the rank that has most
    for (const PlannedRank& rank : plan.ranks) {
        double tokens = 0.0;
        for (const std::int64_t s : rank.shards)
            tokens += static_cast<double>(job.shards[static_cast<std::size_t>(s)].tokens());
        busiest = std::max(busiest, tokens);
    }
    const Attention& attention = job.graph.attention;
    const double attention_flops =
        2.0 * static_cast<double>(plan.calibration.longest * attention.heads * attention.head_dim);
    const double passes = job.spec.quantization.true_sequential ? 1.0 : 2.0;
    time.forward =
        passes * blocks * busiest *
        (2.0 * static_cast<double>(job.graph.block_parameters()) + attention_flops / kAttentionShare) / rate;
    for (const Stage& stage : job.graph.stages) {
        const auto n = static_cast<double>(stage.group.columns());
        const auto rows = static_cast<double>(stage.group.rows());
        time.hessian += blocks * busiest * n * n / rate;
        time.factor += blocks * n * n * n / 3.0 / (rate * kFactorShare);
        time.solve += blocks * rows * n * n / (rate * kSolveShare * ranks);
    }
    // Reading hides behind computing; the first block and the output's tail do not.
    time.io = (static_cast<double>(plan.model.bytes) / blocks + static_cast<double>(plan.disk_needed)) /
              kDiskBytesPerSecond;
    return time;
}

void find_obstacles(const PreparedJob& job, Plan& plan) {
    const QuantizationSpec& spec = job.spec.quantization;
    const GptqFormat format = gptq_format_from(job.spec.output.format);
    const std::int64_t shards = job.spec.output.tensor_parallel;
    std::vector<std::string>& unservable = job.spec.output.allow_unservable ? plan.warnings : plan.problems;
    for (const Stage& stage : job.graph.stages) {
        for (const Linear& linear : stage.group.linears) {
            const QuantizationGrid grid = grid_for(spec.bits, spec.group_size, spec.sym, linear.columns);
            if (const std::string obstacle = gptq_obstacle(linear.rows, linear.columns, grid, format);
                !obstacle.empty()) {
                plan.problems.push_back(fmt::format("{}: {}", linear.name, obstacle));
            }
            // Inner widths (of linears that feed the residual) are split by columns, the others by rows.
            const std::int64_t unit = stage.residual ? shards * grid.group_size : grid.group_size;
            if (linear.columns % unit != 0 && spec.group_size > 0) {
                unservable.push_back(fmt::format(
                    "{}: its width {} is not a multiple of {}group_size {}: vLLM, SGLang and the Marlin and "
                    "ExLlama "
                    "kernels refuse it; choose another quantization.group_size, or output.allow_unservable: "
                    "true",
                    linear.name, linear.columns,
                    stage.residual && shards > 1 ? fmt::format("tensor_parallel {} x ", shards) : "",
                    grid.group_size));
            }
            if (!stage.residual && linear.rows % (shards * 32) != 0 && shards > 1) {
                unservable.push_back(
                    fmt::format("{}: its {} rows cannot be split over tensor_parallel {} in whole "
                                "32-bit words: vLLM and SGLang refuse it",
                                linear.name, linear.rows, shards));
            }
        }
    }
}

void find_warnings(const PreparedJob& job, Plan& plan) {
    const QuantizationSpec& spec = job.spec.quantization;
    if (!spec.sym) {
        plan.warnings.emplace_back(
            "sym: false is loaded by GPTQModel and transformers; vLLM and most SGLang kernels "
            "take symmetric checkpoints only");
    }
    if (spec.bits < 4) {
        plan.warnings.push_back(fmt::format(
            "{} bits load in GPTQModel and SGLang; vLLM's gptq loader takes 4 and 8 bits", spec.bits));
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

void find_shortages(Plan& plan) {
    if (plan.disk_needed > plan.disk_free) {
        plan.problems.push_back(fmt::format(
            "output.directory {}: the checkpoint needs {:.2f} GB, {:.2f} GB are free", plan.output_directory,
            static_cast<double>(plan.disk_needed) * 1e-9, static_cast<double>(plan.disk_free) * 1e-9));
    }
    for (const PlannedRank& rank : plan.ranks) {
        const std::uint64_t needed = total_memory(rank);
        if (needed <= rank.free_memory) continue;
        plan.problems.push_back(
            fmt::format("rank {} on {} needs {:.2f} GB of memory, {:.2f} GB are free: use more ranks on more "
                        "hosts, or lower "
                        "calibration.sequences or calibration.sequence_length",
                        rank.rank, rank.host, static_cast<double>(needed) * 1e-9,
                        static_cast<double>(rank.free_memory) * 1e-9));
    }
}

}  // namespace

Plan make_plan(const PreparedJob& job, Control& control, Backend& backend, const std::string& communicator,
               bool measure) {
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
        plan.files.push_back(
            {shard.file_name, shard.bytes, static_cast<int>(i % static_cast<std::size_t>(control.size()))});
    }
    plan.disk_needed = job.layout.total_bytes();
    plan.disk_free = free_disk(job.spec.output.directory);
    plan.ranks = describe_ranks(job, control, backend);
    if (measure) plan.time = estimate_time(job, control, backend, plan);
    find_obstacles(job, plan);
    find_warnings(job, plan);
    find_shortages(plan);
    return plan;
}

}  // namespace quantmill
