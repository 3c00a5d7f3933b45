#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "kernels/make_backend.h"
#include "tests/pipeline/tiny_checkpoint.h"
#include "workers/calibration_batches.h"

namespace quantmill {
namespace {

class CalibrationBatchesTest : public ::testing::Test {
protected:
    CalibrationBatchesTest()
        : backend_(make_backend("cpu", 0)),
          graph_(build_model_graph(testing::tiny_config("LlamaForCausalLM"), "config.json")),
          seed_(std::random_device{}()),
          random_(seed_) {
        std::vector<std::int64_t> lengths(5 + random_() % 40);
        for (std::int64_t& length : lengths) length = 1 + static_cast<std::int64_t>(random_() % 900);
        shards_ = plan_batch_shards(lengths, 1000);
        for (const BatchShard& shard : shards_) tokens_ += shard.tokens();
    }

    // Runs stages of a made-up block: what a pass may read goes into a sum, what it writes depends on what it
    // read. Returns everything seen.
    std::vector<double> walk(const ActivationPlacement& placement) {
        CalibrationBatches batches(*backend_, graph_, shards_, placement);
        batches.for_each({.writes_hidden = true}, [](const auto& batch, const BatchState& state) {
            fill(state.hidden, static_cast<float>(batch.first_token % 97));
        });
        std::vector<double> seen;
        for (int block = 0; block < 2; ++block) {
            for (std::size_t stage = 0; stage < graph_.stages.size(); ++stage) {
                const std::size_t first = first_of_pass(graph_, stage, placement.keeps_carried);
                batches.for_each(use_of_input(graph_, first), [&](const auto&, const BatchState& state) {
                    for (std::size_t before = first; before < stage; ++before) step(before, state);
                    seen.push_back(sum(input(stage, state)));
                });
                if (!placement.keeps_carried && !graph_.stages[stage].residual) continue;
                batches.for_each(use_of_stages(graph_, first, stage + 1),
                                 [&](const auto&, const BatchState& state) {
                                     for (std::size_t s = first; s <= stage; ++s) step(s, state);
                                 });
            }
        }
        batches.for_each({.reads_hidden = true},
                         [&](const auto&, const BatchState& state) { seen.push_back(sum(state.hidden)); });
        return seen;
    }

    TensorView input(std::size_t stage, const BatchState& state) const {
        const Stage& at = graph_.stages[stage];
        if (at.input == StageInput::norm) return state.hidden;
        return state.carried.leading({state.carried.extent(0), at.group.columns()});
    }
    void step(std::size_t stage, const BatchState& state) const {
        const auto value = static_cast<float>(std::fmod(sum(input(stage, state)), 1000.0));
        if (graph_.stages[stage].residual) {
            fill(state.hidden, value + state.hidden.data<float>()[0]);
        } else {
            const std::int64_t columns = graph_.stages[stage + 1].group.columns();
            fill(state.carried.leading({state.carried.extent(0), columns}), value + 1.0F);
        }
    }
    static void fill(TensorView view, float first) {
        auto* data = view.data<float>();
        for (std::int64_t i = 0; i < view.shape().count(); ++i) data[i] = first + static_cast<float>(i % 13);
    }
    static double sum(ConstTensorView view) {
        double total = 0.0;
        for (std::int64_t i = 0; i < view.shape().count(); ++i) total += view.data<float>()[i] * (i % 7 + 1);
        return total;
    }

    std::unique_ptr<Backend> backend_;
    ModelGraph graph_;
    unsigned seed_;
    std::mt19937 random_;
    std::vector<BatchShard> shards_;
    std::int64_t tokens_ = 0;
};

TEST_F(CalibrationBatchesTest, WhereActivationsLiveChangesNothing) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::vector<double> expected = walk({});
    for (const bool keeps_carried : {true, false}) {
        for (const std::int64_t device_tokens : {std::int64_t{0}, tokens_ / 3, tokens_ - 1, tokens_}) {
            EXPECT_EQ(walk({device_tokens, keeps_carried}), expected)
                << device_tokens << " of " << tokens_ << " tokens, carried inputs "
                << (keeps_carried ? "kept" : "recomputed");
        }
    }
}

TEST_F(CalibrationBatchesTest, ShardsHoldTheirBatchesInOrder) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const CalibrationBatches batches(*backend_, graph_, shards_, {.device_tokens = tokens_ / 2});
    ASSERT_EQ(batches.shards(), shards_.size());
    std::int64_t token = 0;
    for (std::size_t s = 0; s < shards_.size(); ++s) {
        ASSERT_EQ(batches.first_of(s + 1) - batches.first_of(s), shards_[s].micro_batches.size());
        for (std::size_t b = batches.first_of(s); b < batches.first_of(s + 1); ++b) {
            EXPECT_EQ(batches.batches()[b].first_token, token);
            token += batches.batches()[b].plan.sequences.tokens();
        }
    }
    EXPECT_EQ(token, tokens_);
}

TEST_F(CalibrationBatchesTest, UseOfStagesOfABlock) {
    // qkv reads hidden; its attention is carried to o, which adds to hidden.
    const StateUse qkv = use_of_stages(graph_, 0, 1), o = use_of_stages(graph_, 1, 2);
    EXPECT_TRUE(qkv.reads_hidden);
    EXPECT_FALSE(qkv.writes_hidden);
    EXPECT_EQ(qkv.writes_carried, 64);
    EXPECT_EQ(o.reads_carried, 64);
    EXPECT_TRUE(o.reads_hidden && o.writes_hidden);
    EXPECT_EQ(o.writes_carried, 0);
    const StateUse block = use_of_stages(graph_, 0, 4);
    EXPECT_TRUE(block.reads_hidden && block.writes_hidden);
    EXPECT_EQ(block.reads_carried + block.writes_carried, 0);
    EXPECT_EQ(use_of_input(graph_, 3).reads_carried, 96);
}

}  // namespace
}  // namespace quantmill
