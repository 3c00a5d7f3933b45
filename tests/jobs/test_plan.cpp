#include <gtest/gtest.h>

#include <algorithm>

#include "jobs/plan.h"

namespace quantmill {
namespace {

// Llama-3-70B on `world` ranks of two a host; rank 0 also holds the embeddings.
Plan large_plan(int world) {
    Plan plan;
    plan.job = "llama-3-70b.yaml";
    plan.backend = "cuda";
    plan.communicator = "nccl";
    plan.model = {"Meta-Llama-3-70B", "llama", "LlamaForCausalLM", "bf16", 80, 70'553'706'496,
                  141'107'412'992,    30};
    plan.quantization = {"4 bits, group_size 128, symmetric",
                         560,
                         68'451'041'280,
                         {{"qkv", {"q_proj", "k_proj", "v_proj"}, 10240, 8192},
                          {"o", {"o_proj"}, 8192, 8192},
                          {"gate_up", {"gate_proj", "up_proj"}, 57344, 8192},
                          {"down", {"down_proj"}, 8192, 28672}},
                         {"model.embed_tokens", "lm_head", "norms"}};
    plan.calibration = {"calib.h5", 128, 262'144, 2048, 16, 128, ""};
    plan.output_directory = "out/W4g128";
    plan.output_format = "gptq";
    for (int i = 0; i < 8; ++i)
        plan.files.push_back(
            {"model-0000" + std::to_string(i + 1) + "-of-00008.safetensors", 4'975'000'000, i % world});
    plan.disk_needed = 39'800'000'000;
    plan.disk_free = 1'200'000'000'000;
    for (int r = 0; r < world; ++r) {
        PlannedRank rank{r, "gpu0" + std::to_string(r / 2 + 1), 128 / world, {}, {}, {}, {}, 78'000'000'000};
        for (int shard = 0; shard < 16; ++shard)
            if (shard * world / 16 == r) rank.shards.push_back(shard);
        for (const auto& group : plan.quantization.groups) rank.rows.push_back(group.rows / world);
        for (int i = 0; i < 8; ++i)
            if (i % world == r) rank.output_files.push_back(i);
        rank.memory = {{"weights of a block", 1'711'000'000}, {"activations", 4'300'000'000}};
        if (r == 0) rank.memory.push_back({"embeddings", 2'100'000'000});
        plan.ranks.push_back(rank);
    }
    plan.time = PlannedTime{240, 160, 90, 130, 60, 421'000};
    return plan;
}

void expect_line(const std::string& text, const std::string& line) {
    EXPECT_NE(("\n" + text).find("\n" + line + "\n"), std::string::npos) << "no line\n"
                                                                         << line << "\nin\n"
                                                                         << text;
}

TEST(Plan, TextTellsWhatDecides) {
    const auto text = to_text(large_plan(8));
    expect_line(text, "Model          Meta-Llama-3-70B: llama (LlamaForCausalLM), 80 blocks");
    expect_line(text, "               70.6 B parameters, 141 GB bf16 in 30 files");
    expect_line(text, "               560 linears: 68.5 B of the parameters (97%)");
    expect_line(text, "               down     8192 x 28672  down_proj");
    expect_line(text, "               left alone: model.embed_tokens, lm_head, norms");
    expect_line(text, "               128 sequences of up to 2048 tokens, 262 k tokens in all");
    expect_line(text, "               39.8 GB in 8 files, 28.2% of the model's size");
    expect_line(text, "               disk: 39.8 GB needed, 1.20 TB free");
    auto again = large_plan(8);
    again.disk_reclaimed = 39'900'000'000;
    expect_line(
        to_text(again),
        "               disk: 39.8 GB needed, 1.20 TB free once 39.9 GB of an earlier run are removed");
    expect_line(text, "Time           about 11 min, at 421 TFLOP/s a rank as measured now");
    EXPECT_EQ(text.find("target_bits"), std::string::npos);
    again.time->measuring = 320;
    expect_line(to_text(again), "Time           about 17 min, at 421 TFLOP/s a rank as measured now");
    expect_line(to_text(again),
                "               before that 5.3 min for target_bits: solves with 2, 3, 4 and 8 bits");
    expect_line(text, "  2.10 GB  embeddings");
    expect_line(text, "  8.11 GB  together; 78.0 GB free");
    expect_line(text, "Nothing stands in the way: start it with quantmill run.");
}

TEST(Plan, EqualRanksShareALine) {
    const auto text = to_text(large_plan(8));
    expect_line(text,
                "  rank  host                     sequences  shards         qkv rows  o rows  gate_up rows  "
                "down rows   memory     free  files");
    expect_line(text,
                "  0     gpu01                           16  0-1                1280    1024          7168  "
                "     1024  8.11 GB  78.0 GB  1");
    expect_line(text,
                "  1-7   gpu01 … gpu04 (4 hosts)    16 each  2-15 (2 each)      1280    1024          7168  "
                "     1024  6.01 GB  78.0 GB  2-8 (1 each)");
}

TEST(Plan, ADifferenceInAnyCellUnfolds) {
    const auto lines = [](const Plan& plan) {
        const auto text = to_text(plan);
        return std::ranges::count(text, '\n');
    };
    const auto folded = lines(large_plan(8));
    auto plan = large_plan(8);
    plan.ranks[3].rows[2] += 128;
    EXPECT_EQ(lines(plan), folded + 1);
    plan.ranks[5].sequences += 1;
    EXPECT_EQ(lines(plan), folded + 2);
    plan.ranks[6].free_memory /= 2;
    EXPECT_EQ(lines(plan), folded + 3);
    plan.ranks[7].output_files.clear();
    EXPECT_EQ(lines(plan), folded + 4);
    EXPECT_LE(lines(large_plan(64)), folded + 3);  // with and without shards, with and without files
}

TEST(Plan, OneRankAndManyFiles) {
    auto plan = large_plan(1);
    plan.files.assign(40, {"model.safetensors", 1'000'000'000, 0});
    plan.files.back().name = "last.safetensors";
    plan.time.reset();
    const auto text = to_text(plan);
    expect_line(text, "               1 rank, tensors over nccl");
    expect_line(text, "  … 29 more");
    expect_line(text, "  last.safetensors   1.00 GB  rank 0");
    expect_line(text, "Time           not measured");
}

TEST(Plan, ProblemsAreTheLastWord) {
    auto plan = large_plan(2);
    plan.warnings = {"few servers read 3 bits"};
    plan.problems = {"rank 1 needs 90 GB, free are 78 GB: use more ranks"};
    const auto text = to_text(plan);
    EXPECT_TRUE(
        text.ends_with("\nWarnings\n  - few servers read 3 bits\n\nThis job cannot run\n"
                       "  - rank 1 needs 90 GB, free are 78 GB: use more ranks\n"))
        << text;
}

TEST(Plan, AnEmptyPlanIsShownToo) { EXPECT_FALSE(to_text({}).empty()); }

}  // namespace
}  // namespace quantmill
