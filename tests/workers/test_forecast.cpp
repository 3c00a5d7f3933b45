#include <gtest/gtest.h>

#include "tests/pipeline/tiny_checkpoint.h"
#include "workers/forecast.h"

namespace quantmill {
namespace {

// A model of `blocks` equal blocks and 16 shards of one micro-batch each.
class ForecastTest : public ::testing::Test {
protected:
    explicit ForecastTest(int blocks = 12) {
        auto config = testing::tiny_config("LlamaForCausalLM");
        config["num_hidden_layers"] = blocks;
        graph_ = build_model_graph(config, "config.json");
        work_.graph = &graph_;
        work_.shards = plan_batch_shards(std::vector<std::int64_t>(16, 100), 2048);
        work_.read_bytes = work_.written_bytes = 0.0;
    }
    World world(int ranks, std::uint64_t memory = std::uint64_t{1} << 40U) const {
        return imagine_world(ranks, 4, memory);
    }

    ModelGraph graph_;
    PlannedWork work_;
    Rates rates_{1e9, 1e9, 1e9, 1e9, 1e9, 1e30, 0.0, 1e30, 1e30, 1e30};  // nothing but arithmetic costs
};

TEST_F(ForecastTest, CountsOperations) {
    double forward = 0.0, hessian = 0.0, factor = 0.0, solve = 0.0;
    for (const StageWork& work : stage_work(graph_.stages, graph_.attention, 100)) {
        forward += work.forward;
        hessian += work.hessian;
        factor += work.factor;
        solve += work.solve;
    }
    // qkv 128 x 64, o 64 x 64, gate+up 192 x 64, down 64 x 96
    EXPECT_DOUBLE_EQ(forward, 2.0 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96));
    EXPECT_DOUBLE_EQ(hessian, 3.0 * 64 * 64 + 96 * 96);
    EXPECT_DOUBLE_EQ(factor, (3.0 * 64 * 64 * 64 + 96.0 * 96 * 96) / 3);
    EXPECT_DOUBLE_EQ(solve, (128.0 + 64 + 192) * 64 * 64 + 64.0 * 96 * 96);
}

// Whole blocks as bench_block timed them on one H200 (bench/RESULTS.md): 128 x 2048 tokens, products at 790
// TFLOP/s.
TEST(CostModel, GivesTheTimesOfMeasuredBlocks) {
    struct Measured {
        std::int64_t hidden, inner, heads;
        double forward, hessian, factor, block;
        double swept, best;  // the block with sweeps: 2, with preset: best
    };
    for (const Measured& measured : {Measured{8192, 28672, 64, 0.704, 0.490, 0.093, 1.385, 2.810, 5.566},
                                     Measured{4096, 14336, 32, 0.186, 0.130, 0.027, 0.368, 0.609, 1.292}}) {
        auto config = testing::tiny_config("LlamaForCausalLM");
        config["hidden_size"] = measured.hidden;
        config["intermediate_size"] = measured.inner;
        config["num_attention_heads"] = measured.heads;
        config["num_key_value_heads"] = 8;
        config["head_dim"] = 128;
        const ModelGraph graph = build_model_graph(config, "config.json");
        PlannedWork work;
        work.graph = &graph;
        work.shards = plan_batch_shards(std::vector<std::int64_t>(128, 2048), 16384);
        const World alone = imagine_world(1, 1, std::uint64_t{1} << 40U);
        const auto planned = [&] {
            return forecast_quantized(work, alone, rates_of("cuda", 7e14), row_groups(alone, 1), true).time;
        };
        const PlannedTime time = planned();
        EXPECT_NEAR(time.forward / graph.blocks, measured.forward, 0.05 * measured.forward);
        EXPECT_NEAR(time.hessian / graph.blocks, measured.hessian, 0.05 * measured.hessian);
        EXPECT_NEAR(time.factor / graph.blocks, measured.factor, 0.05 * measured.factor);
        EXPECT_NEAR(time.total() / graph.blocks, measured.block, 0.06 * measured.block);
        work.options.grid = {4, 128, true, ScaleSearch::hessian, true};
        work.options.sweeps = 2;
        EXPECT_NEAR(planned().total() / graph.blocks, measured.swept, 0.1 * measured.swept);
        work.options.refit = true;
        work.options.error_propagation_alpha = 1.0;
        EXPECT_NEAR(planned().total() / graph.blocks, measured.best, 0.1 * measured.best);
    }
}

TEST_F(ForecastTest, ASearchForScalesCostsItsTrials) {
    rates_.squared_trial = 10.0;
    rates_.power_trial = 50.0;
    const World alone = world(1);
    const auto solve = [&](const QuantizationGrid& grid) {
        work_.options.grid = grid;
        return forecast_quantized(work_, alone, rates_, row_groups(alone, 1), true).time.solve;
    };
    const double weights = 12.0 * static_cast<double>(graph_.block_parameters());
    const double plain = solve({4, 64, true});
    EXPECT_NEAR(solve({4, 64, true, ScaleSearch::hessian}) - plain, weights * 17 * 10 / 1e9, 1e-9);
    EXPECT_NEAR(solve({4, 64, true, ScaleSearch::hessian, true}) - plain, weights * 34 * 10 / 1e9, 1e-9);
    EXPECT_NEAR(solve({4, 64, false, ScaleSearch::mse}) - plain, weights * 80 * 50 / 1e9, 1e-9);
    EXPECT_NEAR(solve({2, 64, false, ScaleSearch::mse}) - plain, weights * 160 * 50 / 1e9, 1e-9);
}

TEST_F(ForecastTest, RefinementCostsItsSweepsAndFits) {
    rates_.sweep = {10.0, 100.0};
    rates_.refit = {3.0, 50.0};
    const World alone = world(1);
    const auto solve = [&](int sweeps, bool refit, double alpha) {
        work_.options.sweeps = sweeps;
        work_.options.refit = refit;
        work_.options.error_propagation_alpha = alpha;
        return forecast_quantized(work_, alone, rates_, row_groups(alone, 1), true).time.solve;
    };
    const double plain = solve(0, false, 0.0);
    const double trial = 12.0 * static_cast<double>(graph_.block_parameters()) / 1e9;  // one for each weight
    EXPECT_NEAR(solve(2, false, 0.0), 21 * plain + 200 * trial, 1e-9);
    EXPECT_NEAR(solve(0, true, 0.0), 4 * plain + 50 * trial, 1e-9);
    EXPECT_NEAR(solve(2, true, 0.0), (1 + 2 * 10 + 3 * 3) * plain + 350 * trial, 1e-9);
    EXPECT_NEAR(solve(1, false, 1.0), (5 + 10) * plain + 100 * trial, 1e-9);  // propagation: four more
    const double original = block_cost(work_, rates_, 1.0).solves();
    work_.options = {};
    EXPECT_GT(original, block_cost(work_, rates_, 1.0).solves());
}

TEST_F(ForecastTest, FurtherCheckpointsCostASolveAndAWrite) {
    const LayerPlan layers = plan_layers(work_, world(4), rates_, 2);
    const double one = forecast_original(work_, world(4), rates_, layers).layers.seconds;
    work_.solves = 3.0;
    work_.factors = 2.0;
    const double three = forecast_original(work_, world(4), rates_, layers).layers.seconds;
    // Groups of two ranks, six blocks each: a rank has half of a group's 24 Hessians.
    const BlockCost block = block_cost(graph_, rates_, 1600, 100);
    EXPECT_NEAR(three - one, 3 * (block.factors() + 2 * block.solves()), 1e-9);
}

TEST_F(ForecastTest, AStoreOfHessiansNeedsNoStream) {
    const LayerPlan layers = plan_without_stream(world(4).hosts, 12);
    rates_.disk = 1e6;
    const Forecast forecast = forecast_original(work_, world(4), rates_, layers);
    const BlockCost block = block_cost(graph_, rates_, 1600, 100);
    double hessians = 0.0;
    for (const Stage& stage : graph_.stages) {
        hessians += static_cast<double>(stage.group.columns() * (stage.group.columns() + 1) * 4);
    }
    const double weights = static_cast<double>(graph_.block_parameters()) * 2.0;
    EXPECT_NEAR(forecast.layers.seconds,
                3 * (4 * (hessians + weights) / rates_.disk + block.factors() + block.solves()), 1e-9);
    EXPECT_EQ(forecast.layers.bubble, 0.0);
    EXPECT_EQ(forecast.layers.sweeps, 0);
}

TEST_F(ForecastTest, AStreamThroughGroupsIsTheSumOfItsParts) {
    const LayerPlan alone = plan_layers(work_, world(1), rates_, 1);
    const double one = total_seconds(simulate(work_, world(1), rates_, alone));
    const BlockCost block = block_cost(graph_, rates_, 1600, 100);
    EXPECT_NEAR(one, 12 * (block.stream + block.factors() + block.solves()), 1e-9);

    const LayerPlan plan = plan_layers(work_, world(4), rates_, 4);
    ASSERT_EQ(plan.sweeps.size(), 1U);
    const auto lines = simulate(work_, world(4), rates_, plan);
    // 16 micro-batches and three steps to fill; each step is three blocks of one micro-batch.
    const double step = 3 * block.stream / 16;
    EXPECT_NEAR(lines[3].first_item, 3 * step, 1e-9);
    EXPECT_NEAR(lines[3].streamed, (16 + 3) * step, 1e-9);
    EXPECT_NEAR(total_seconds(lines), (16 + 3) * step + 3 * (block.factors() + block.solves()), 1e-9);
    const Forecast forecast = forecast_original(work_, world(4), rates_, plan);
    EXPECT_NEAR(forecast.layers.alone_seconds, one, 1e-9);
    EXPECT_DOUBLE_EQ(forecast.layers.bubble, 3.0 / 19);
    EXPECT_NEAR(forecast.time.total(), forecast.layers.seconds, 1e-9);
}

TEST_F(ForecastTest, ShortMemoryMeansMoreSweeps) {
    const LayerMemory roomy = layer_memory(work_, plan_layers(work_, world(2), rates_, 2), 0);
    const std::uint64_t block = roomy.blocks / 6;
    std::size_t sweeps = 1;
    std::uint64_t memory = roomy.total();
    for (; memory > 2 * block; memory -= block / 3) {
        LayerPlan plan;
        try {
            plan = plan_layers(work_, world(2, memory), rates_, 2);
        } catch (const BadInput&) {
            break;
        }
        EXPECT_GE(plan.sweeps.size(), sweeps);
        sweeps = plan.sweeps.size();
        for (const int rank : {0, 1}) EXPECT_LE(layer_memory(work_, plan, rank).total(), memory);
        int next = 0;
        for (const auto& sweep : plan.sweeps) {
            for (const BlockRange& range : sweep) {
                EXPECT_EQ(range.begin, next);
                next = range.end;
            }
        }
        EXPECT_EQ(next, 12);
    }
    EXPECT_EQ(sweeps, 6U);  // a block a group at a time, before not even that fits
    EXPECT_THROW(plan_layers(work_, world(2, block), rates_, 2), BadInput);
}

TEST_F(ForecastTest, ChoosesGroupsByWhatTheyGain) {
    // Free links and one micro-batch a shard: splitting sequences has no bubble, so few groups are best.
    EXPECT_EQ(plan_layers(work_, world(4), rates_, std::nullopt).groups.size(), 1U);
    Rates slow = rates_;
    slow.link = slow.network = 1e5;  // sums of Hessians would take longer than all else
    EXPECT_EQ(plan_layers(work_, world(4), slow, std::nullopt).groups.size(), 4U);
    EXPECT_THROW(plan_layers(work_, world(4), rates_, 5), BadInput);
    EXPECT_THROW(plan_layers(work_, world(20), rates_, 13), BadInput);
}

TEST_F(ForecastTest, TheFactorBoundsWhatAllRanksDoTogether) {
    const BlockCost block = block_cost(graph_, rates_, 1600, 100);
    const Forecast four =
        forecast_quantized(work_, world(4), rates_, row_groups(world(4), std::nullopt), true);
    EXPECT_NEAR(four.layers.seconds, 12 * (block.stream / 4 + block.factors() + block.solves() / 4), 1e-9);
    EXPECT_NE(four.layers.bound.find("factors that one rank computes"), std::string::npos);
    // Without true_sequential the four factors of a block are computed at the same time.
    const Forecast at_once = forecast_quantized(work_, world(4), rates_, row_groups(world(4), 1), false);
    EXPECT_NEAR(at_once.time.factor, 12 * 96.0 * 96 * 96 / 3 / 1e9, 1e-9);
    EXPECT_EQ(row_groups(world(8), std::nullopt).groups.size(), 2U);  // two hosts
    EXPECT_THROW(row_groups(world(2), 3), BadInput);
}

}  // namespace
}  // namespace quantmill
