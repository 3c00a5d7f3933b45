#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "pipeline/batch_plan.h"

namespace quantmill {
namespace {

constexpr std::int64_t kMicroBatchTokens = 2048;

std::int64_t sequences_of(const BatchShard& shard) {
    std::int64_t count = 0;
    for (const MicroBatch& batch : shard.micro_batches) count += batch.sequences.count();
    return count;
}

// Every sequence once, in order; a batch is closed only when the next sequence would not have fitted.
void check_plan(const std::vector<std::int64_t>& lengths, const std::vector<BatchShard>& plan) {
    std::int64_t next = 0;
    for (const BatchShard& shard : plan) {
        std::int64_t tokens = 0;
        for (std::size_t b = 0; b < shard.micro_batches.size(); ++b) {
            const MicroBatch& batch = shard.micro_batches[b];
            EXPECT_EQ(batch.first_sequence, next);
            ASSERT_GT(batch.sequences.count(), 0);
            EXPECT_TRUE(batch.sequences.tokens() <= kMicroBatchTokens || batch.sequences.count() == 1);
            for (std::int64_t i = 0; i < batch.sequences.count(); ++i, ++next) {
                const auto at = static_cast<std::size_t>(i);
                EXPECT_EQ(batch.sequences.offsets[at + 1] - batch.sequences.offsets[at],
                          lengths.at(static_cast<std::size_t>(next)));
            }
            tokens += batch.sequences.tokens();
            if (b + 1 < shard.micro_batches.size()) {
                EXPECT_GT(batch.sequences.tokens() + lengths.at(static_cast<std::size_t>(next)),
                          kMicroBatchTokens);
            }
        }
        EXPECT_EQ(shard.tokens(), tokens);
    }
    EXPECT_EQ(next, static_cast<std::int64_t>(lengths.size()));
}

TEST(BatchPlan, CoversAllSequencesInOrder) {
    const unsigned seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937 random(seed);
    for (int round = 0; round < 200; ++round) {
        std::vector<std::int64_t> lengths(1 + random() % 70);
        for (std::int64_t& length : lengths)
            length = random() % 5 == 0 ? 1 + random() % 5000 : 1 + random() % 900;
        const auto plan = plan_batch_shards(lengths, kMicroBatchTokens);
        check_plan(lengths, plan);

        const auto count = static_cast<std::int64_t>(plan.size());
        const auto most = std::min<std::int64_t>(kMaxBatchShards, static_cast<std::int64_t>(lengths.size()));
        EXPECT_EQ(count & (count - 1), 0) << "no power of two";
        EXPECT_LE(count, most);
        EXPECT_GT(2 * count, most) << "a larger power of two would do";
        if (plan.empty()) continue;
        const auto [fewest, largest] = std::ranges::minmax(plan, {}, sequences_of);
        EXPECT_LE(sequences_of(largest) - sequences_of(fewest), 1);
    }
}

TEST(BatchPlan, MicroBatchMayBeExactlyFull) {
    const std::vector<std::int64_t> lengths(32, kMicroBatchTokens / 2);
    for (const BatchShard& shard : plan_batch_shards(lengths, kMicroBatchTokens))
        EXPECT_EQ(shard.micro_batches.size(), 1U);
}

TEST(BatchPlan, CountsOfShards) {
    for (const auto& [sequences, shards] :
         {std::pair{1, 1}, {2, 2}, {3, 2}, {5, 4}, {15, 8}, {16, 16}, {1000, 16}}) {
        const std::vector<std::int64_t> lengths(static_cast<std::size_t>(sequences), 10);
        EXPECT_EQ(plan_batch_shards(lengths, kMicroBatchTokens).size(), static_cast<std::size_t>(shards))
            << sequences << " sequences";
    }
    EXPECT_TRUE(plan_batch_shards({}, kMicroBatchTokens).empty());
}

}  // namespace
}  // namespace quantmill
