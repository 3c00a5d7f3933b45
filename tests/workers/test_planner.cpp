#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <numeric>

#include "jobs/presets.h"
#include "kernels/make_backend.h"
#include "tests/comm/memory_backend.h"
#include "tests/pipeline/tiny_checkpoint.h"
#include "workers/bit_choice.h"
#include "workers/job_scheme.h"
#include "workers/layer_planner.h"
#include "workers/planner.h"

namespace quantmill {
namespace {

using testing::TemporaryDirectory;
using testing::tiny_config;

class Planner : public ::testing::Test {
protected:
    Planner() : control_(make_control(false)), backend_(make_backend("cpu", 0)) {
        spec_.model = directory_.path();
        spec_.output.directory = output_ / "out";
        spec_.output.max_shard_size = 20'000;
        spec_.quantization.group_size = 32;
    }

    // A job on a tiny model with sequences of these lengths.
    PreparedJob job(const std::vector<std::int64_t>& lengths = std::vector<std::int64_t>(20, 30)) {
        ModelGraph graph = testing::write_tiny_checkpoint(directory_, config_);
        CheckpointReader reader(directory_.path());
        CalibrationStore store;
        for (const std::int64_t length : lengths)
            store.sequences.emplace_back(static_cast<std::size_t>(length), 1);
        QuantizationScheme scheme = scheme_of_job(spec_, graph, true);
        OutputLayout layout = plan_output(reader, graph, scheme, spec_.output.max_shard_size);
        const bool head = scheme.quantizes_head();
        return {spec_,
                std::move(reader),
                std::move(graph),
                std::move(store),
                plan_batch_shards(lengths, backend_->micro_batch_tokens()),
                std::move(scheme),
                std::move(layout),
                head};
    }
    Plan plan(const PreparedJob& job) { return make_plan(job, *control_, *backend_, "mpi", false); }
    std::string problems() { return fmt::format("{}", fmt::join(plan(job()).problems, "\n")); }
    std::string warnings() { return fmt::format("{}", fmt::join(plan(job()).warnings, "\n")); }

    TemporaryDirectory directory_, output_;  // the model's, the result's
    nlohmann::json config_ = tiny_config("LlamaForCausalLM");
    JobSpec spec_;
    std::unique_ptr<Control> control_;
    std::unique_ptr<Backend> backend_;
};

bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

TEST_F(Planner, DescribesModelJobAndFiles) {
    const PreparedJob prepared = job({10, 20, 30, 400, 7});
    const Plan plan = this->plan(prepared);
    EXPECT_TRUE(plan.problems.empty());
    EXPECT_EQ(plan.model.architecture, "LlamaForCausalLM");
    EXPECT_EQ(plan.model.blocks, 2);
    EXPECT_EQ(plan.model.parameters,
              2 * (128 * 64 + 64 * 64 + 2 * 96 * 64 + 64 * 96 + 2 * 64) + 2 * 128 * 64 + 64);
    EXPECT_EQ(plan.model.bytes, 2 * static_cast<std::uint64_t>(plan.model.parameters));
    EXPECT_EQ(plan.quantization.linears, 14);
    EXPECT_EQ(plan.quantization.parameters, 2 * (128 * 64 + 64 * 64 + 3 * 96 * 64));
    EXPECT_EQ(plan.calibration.sequences, 5);
    EXPECT_EQ(plan.calibration.token_count, 467);
    EXPECT_EQ(plan.calibration.longest, 400);
    EXPECT_EQ(plan.calibration.shards, 4);
    EXPECT_FALSE(plan.time.has_value());

    ASSERT_EQ(plan.files.size(), prepared.layout.shards.size());
    EXPECT_GT(plan.files.size(), 3U);
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < plan.files.size(); ++i) {
        EXPECT_EQ(plan.files[i].name, prepared.layout.shards[i].file_name);
        EXPECT_EQ(plan.files[i].bytes, prepared.layout.shards[i].bytes);
        EXPECT_EQ(plan.files[i].owner, 0);
        bytes += plan.files[i].bytes;
    }
    EXPECT_EQ(plan.disk_needed, bytes);
    EXPECT_EQ(plan.disk_reclaimed, 0U);
    directory_.write("more/appendix.pdf", std::string(5000, 'x'));
    directory_.write("pytorch_model.bin", "is not copied");
    output_.write("out/.quantmill/lock", "");
    output_.write("out/model-00001-of-00009.safetensors.partial", std::string(100'000, 'x'));
    const Plan again = this->plan(prepared);
    EXPECT_EQ(again.disk_needed, bytes + 5000);
    EXPECT_GE(again.disk_reclaimed, 100'000U);
    EXPECT_GE(again.disk_free, again.disk_reclaimed);
    ASSERT_EQ(plan.ranks.size(), 1U);
    EXPECT_EQ(plan.ranks[0].sequences, 5);
    EXPECT_EQ(plan.ranks[0].rows, (std::vector<std::int64_t>{128, 64, 192, 64}));
    EXPECT_EQ(plan.ranks[0].output_files.size(), plan.files.size());
}

TEST_F(Planner, MeasuresWhenAsked) {
    const Plan plan = make_plan(job(), *control_, *backend_, "mpi", true);
    ASSERT_TRUE(plan.time.has_value());
    const PlannedTime time = plan.time.value_or(PlannedTime{});
    for (const double value : {time.gflops, time.forward, time.hessian, time.factor, time.solve, time.io}) {
        EXPECT_GT(value, 0.0);
    }
}

// A pass of the original model, a factor and four solves of each Hessian, after each of which the first
// shard's tokens pass the block, and all blocks' Hessians at once.
TEST_F(Planner, ABudgetOfBitsIsMeasuredFirst) {
    const PlannedTime without =
        make_plan(job(), *control_, *backend_, "mpi", true).time.value_or(PlannedTime{});
    EXPECT_EQ(without.measuring, 0.0);
    spec_.quantization.target_bits = 6.0;
    const PreparedJob prepared = job();
    const Plan plan = make_plan(prepared, *control_, *backend_, "mpi", true);
    const PlannedTime time = plan.time.value_or(PlannedTime{});
    const Rates rates = rates_of(backend_->name(), time.gflops * 1e9);
    const ModelGraph& graph = prepared.graph;
    const BlockCost cost = block_cost(graph, rates, 600, 30, prepared.scheme.usual());
    const auto weights = static_cast<double>(2 * graph.block_parameters() + 128 * 64);
    double forward = 0.0;
    for (const StageWork& stage : stage_work(graph.stages, graph.attention, 30)) {
        forward += stage.forward / rates.forward + stage.attention / rates.attention;
    }
    const double probes = 4 * 4 * static_cast<double>(prepared.shards.front().tokens()) * forward;
    EXPECT_NEAR(time.measuring,
                2 * (cost.stream + cost.factors() + 4 * cost.solves() + probes) + 2 * weights / rates.disk,
                1e-6 * time.measuring);
    EXPECT_NEAR(time.total(),
                time.forward + time.hessian + time.factor + time.solve + time.io + time.measuring, 1e-9);

    spec_.quantization.propagate = "original";
    const std::vector<PreparedJob> measured = jobs_to_measure(job());
    const std::uint64_t needed =
        layer_memory(planned_work(measured, *backend_),
                     layers_of(measured, imagine_world(1, 1, 1U << 30U), *backend_), 0)
            .total();
    EXPECT_EQ(total_memory(plan.ranks.front()), needed);
    EXPECT_GT(needed, 2 * HessianAccumulator::bytes(96));
    // What the job itself takes again costs nothing more.
    EXPECT_EQ(total_memory(this->plan(job()).ranks.front()), needed);
}

std::uint64_t bytes_named(const Plan& plan, const std::string& name) {
    for (const NamedBytes& part : plan.ranks.front().memory) {
        if (contains(part.name, name)) return part.bytes;
    }
    return 0;
}

TEST_F(Planner, ErrorPropagationTakesASecondPath) {
    for (const bool true_sequential : {true, false}) {
        spec_.quantization.true_sequential = true_sequential;
        spec_.quantization.error_propagation_alpha = 0.0;
        const Plan without = plan(job());
        spec_.quantization.error_propagation_alpha = 0.5;
        const Plan with = plan(job());
        const std::string activations = true_sequential ? "calibration activations" : "hidden states";
        EXPECT_GT(bytes_named(without, activations), 0U);
        EXPECT_EQ(bytes_named(with, activations), 2 * bytes_named(without, activations));
        EXPECT_EQ(bytes_named(without, "error of the inputs"), 0U);
        // Sums and their shard's matrix: of the widest stage, or of all at once.
        const std::uint64_t squares = true_sequential ? 96 * 96 : 3 * 64 * 64 + 96 * 96;
        EXPECT_GE(bytes_named(with, "error of the inputs"), 12 * squares);
        EXPECT_GT(total_memory(with.ranks.front()), total_memory(without.ranks.front()));
    }
}

// Of the group that takes most: the widest, [64, 96], or with several blocks at once that of most weights,
// [192, 64].
TEST_F(Planner, RefinementTakesTheDampedHessian) {
    spec_.quantization.preset = "plain";
    apply_preset(spec_.quantization, [](std::string_view) { return false; });
    for (const bool desc_act : {false, true}) {
        for (const std::string propagate : {"quantized", "original"}) {
            spec_.quantization.desc_act = desc_act;
            spec_.quantization.propagate = propagate;
            spec_.quantization.sweeps = 0;
            const std::uint64_t without = bytes_named(plan(job()), "rows being solved");
            spec_.quantization.sweeps = 1;
            const std::uint64_t with = bytes_named(plan(job()), "rows being solved");
            const std::uint64_t columns = propagate == "original" ? 64 : 96;
            EXPECT_GE(with, without + 4 * columns * columns) << propagate;
        }
    }
}

TEST_F(Planner, GroupSizeMustDivideEveryWidth) {
    EXPECT_EQ(problems(), "");
    spec_.quantization.group_size = -1;
    EXPECT_EQ(problems(), "");
    spec_.quantization.group_size = 64;  // divides 64, not the inner width 96
    EXPECT_TRUE(contains(problems(), "mlp.down_proj: its width 96")) << problems();
    EXPECT_FALSE(contains(problems(), "q_proj"));
    EXPECT_TRUE(contains(problems(), "vLLM"));
    spec_.output.allow_unservable = true;
    EXPECT_EQ(problems(), "");
    EXPECT_TRUE(contains(warnings(), "mlp.down_proj: its width 96"));
}

TEST_F(Planner, TensorParallelServingNeedsDivisibleWidthsAndRows) {
    spec_.output.tensor_parallel = 3;  // 96 = 3·32, but o_proj reads 64 columns
    EXPECT_TRUE(contains(
        problems(), "self_attn.o_proj: its width 64 is not a multiple of tensor_parallel 3 x group_size 32"))
        << problems();
    EXPECT_FALSE(contains(problems(), "mlp.down_proj: its width")) << problems();
    EXPECT_TRUE(contains(problems(), "self_attn.q_proj: its 64 rows"));
    EXPECT_FALSE(contains(problems(), "mlp.gate_proj"));
    spec_.output.tensor_parallel = 2;
    EXPECT_TRUE(contains(problems(), "self_attn.k_proj: its 32 rows")) << problems();
    EXPECT_FALSE(contains(problems(), "self_attn.q_proj"));
}

TEST_F(Planner, WhatTheFormatCannotHold) {
    spec_.quantization.sym = false;
    EXPECT_TRUE(contains(problems(), "gptq_v2"));
    spec_.output.format = "gptq_v2";
    EXPECT_EQ(problems(), "");
    EXPECT_TRUE(contains(warnings(), "sym: false"));
    spec_.output.allow_unservable = true;  // does not help here
    config_["intermediate_size"] = 100;
    EXPECT_TRUE(contains(problems(), "mlp.down_proj: its 100 columns are not a multiple of 32"))
        << problems();
}

TEST_F(Planner, OutputDirectoryThatARunWouldRefuse) {
    const auto problems_with = [&](bool overwrite) {
        const Plan plan = make_plan(job(), *control_, *backend_, "mpi", false, overwrite);
        return fmt::format("{}", fmt::join(plan.problems, "\n"));
    };
    output_.write("out/.quantmill/lock", "");
    EXPECT_EQ(problems_with(false), "");  // begun
    output_.write("out/model.safetensors.index.json", "{}");
    EXPECT_TRUE(contains(problems_with(false), "finished checkpoint"));
    EXPECT_EQ(problems_with(true), "");
    EXPECT_TRUE(std::filesystem::exists(output_ / "out/model.safetensors.index.json"));
    output_.write("file", "");
    spec_.output.directory = output_ / "file/out";
    EXPECT_TRUE(contains(problems_with(true), (output_ / "file").string() + " is no directory"));
    output_.write("other/model.safetensors", "of somebody else");
    spec_.output.directory = output_ / "other";
    EXPECT_TRUE(contains(problems_with(true), "did not write"));
    spec_.output.directory = directory_.path();
    EXPECT_TRUE(contains(problems_with(true), "model directory"));
    spec_.output.directory = output_ / "new/out";
    EXPECT_EQ(problems_with(false), "");
    EXPECT_FALSE(std::filesystem::exists(output_ / "new"));
}

TEST_F(Planner, Warnings) {
    EXPECT_EQ(warnings(), "");
    spec_.quantization.bits = 3;
    EXPECT_TRUE(contains(warnings(), "3 bits"));
    const auto all = plan(job({50, 60})).warnings;
    EXPECT_TRUE(contains(fmt::format("{}", fmt::join(all, "\n")),
                         "110 calibration tokens are few for Hessians of width 96"));
    config_["max_position_embeddings"] = 16;
    EXPECT_TRUE(contains(warnings(), "sequences of 30 tokens exceed")) << warnings();
}

TEST_F(Planner, MemoryGrowsWithTokensAndBlocks) {
    const auto item = [](const Plan& plan, const std::string& name) {
        for (const NamedBytes& bytes : plan.ranks.at(0).memory) {
            if (bytes.name == name) return bytes.bytes;
        }
        return std::uint64_t{0};
    };
    // Plain GPTQ is at its peak in the widest group; a search of scales has it where there are most rows.
    spec_.quantization.preset = "plain";
    apply_preset(spec_.quantization, [](std::string_view) { return false; });
    const Plan small = plan(job({100})), large = plan(job({100, 100, 100}));
    // Hidden states and what is carried between stages: [tokens, 64 + 96] in fp32.
    EXPECT_EQ(item(small, "calibration activations"), 100U * (64 + 96) * 4);
    EXPECT_EQ(item(large, "calibration activations"), 300U * (64 + 96) * 4);
    // fp32 [C, C] and an int64 triangle of the widest group.
    EXPECT_EQ(item(small, "Hessian and factor"), 96U * 96 * 4 + 96 * 97 / 2 * 8);
    spec_.quantization.true_sequential = false;  // all groups of a block at once
    EXPECT_GT(item(plan(job({100})), "Hessian and factor"), 96U * 96 * 4 + 96 * 97 / 2 * 8);
    EXPECT_EQ(total_memory(small.ranks[0]),
              std::accumulate(small.ranks[0].memory.begin(), small.ranks[0].memory.end(), std::uint64_t{0},
                              [](std::uint64_t sum, const NamedBytes& part) { return sum + part.bytes; }));
}

TEST_F(Planner, ActivationsThatDoNotFitAreStreamed) {
    const PreparedJob prepared = job({100, 100, 100, 100});
    // The free memory of a device on which tensors can fill that many bytes.
    const auto free_for = [](std::size_t usable) {
        std::size_t free = usable;
        while (usable_device_memory(free) < usable) free += usable - usable_device_memory(free);
        return free;
    };
    const auto rank_with = [&](std::size_t usable) {
        MemoryBackend device(false, free_for(usable));
        return make_plan(prepared, *control_, device, "mpi", false).ranks.at(0);
    };
    constexpr std::uint64_t kTokenBytes = (64 + 96) * 4;
    const PlannedRank roomy = rank_with(std::size_t{1} << 30U);
    EXPECT_EQ(roomy.device_tokens, 400);
    const std::uint64_t least = total_memory(roomy);
    EXPECT_EQ(rank_with(least).device_tokens, 400);
    // Two slots of the largest batch, 100 tokens, and what is left for activations that stay.
    const PlannedRank tight = rank_with(least - 1);
    EXPECT_EQ(tight.device_tokens, 199);
    EXPECT_LE(total_memory(tight), least - 1);
    EXPECT_EQ(tight.host_memory - roomy.host_memory, 201 * kTokenBytes);
    EXPECT_EQ(rank_with(least - 200 * kTokenBytes).device_tokens, 0);
    MemoryBackend tiny(false, free_for(least - 200 * kTokenBytes - 1));
    EXPECT_TRUE(make_plan(prepared, *control_, tiny, "mpi", false).ranks.at(0).recomputes);
    spec_.compute.activations = "stream";
    const Plan plan = make_plan(job({100, 100, 100, 100}), *control_, tiny, "mpi", false);
    ASSERT_EQ(plan.problems.size(), 1U);
    EXPECT_TRUE(contains(plan.problems[0], "compute.device_memory")) << plan.problems[0];
}

TEST_F(Planner, InputsOfStagesAreRecomputedWhenThereIsNoRoomForThem) {
    const auto rank_with = [&](std::uint64_t free) {
        MemoryBackend host(true, free);
        return make_plan(job({100, 100, 100, 100}), *control_, host, "mpi", false).ranks.at(0);
    };
    const PlannedRank roomy = rank_with(std::uint64_t{1} << 30U);
    EXPECT_FALSE(roomy.recomputes);
    const PlannedRank tight = rank_with(total_memory(roomy) - 1);
    EXPECT_TRUE(tight.recomputes);
    // The largest batch has 100 of the 400 tokens; 96 columns are carried.
    EXPECT_EQ(total_memory(roomy) - total_memory(tight), 300U * 96 * 4);
    spec_.compute.activations = "stream";
    EXPECT_FALSE(rank_with(total_memory(roomy) - 1).recomputes);
    spec_.compute.activations = "recompute";
    EXPECT_TRUE(rank_with(std::uint64_t{1} << 30U).recomputes);
}

}  // namespace
}  // namespace quantmill
