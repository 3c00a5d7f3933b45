#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <set>

#include "workers/placement.h"

namespace quantmill {
namespace {

const std::vector<int> kWorlds{1, 2, 3, 4, 5, 7, 16, 17, 100};

// [begin, end) pieces in the order of ranks cover [0, count) without holes.
void expect_cover(const std::vector<RowRange>& ranges, std::int64_t count) {
    std::int64_t next = 0;
    for (const RowRange& range : ranges) {
        EXPECT_LE(range.begin, range.end);
        EXPECT_TRUE(range.empty() || range.begin == next);
        next = std::max(next, range.end);
    }
    EXPECT_EQ(next, count);
}

TEST(Placement, ShardsAreSpreadEvenlyAndRankZeroOwnsTheFirst) {
    for (const int world : kWorlds) {
        for (const std::int64_t shards : {1, 2, 4, 8, 16}) {
            std::vector<RowRange> ranges;
            for (int rank = 0; rank < world; ++rank) {
                ranges.push_back(shards_of_rank(shards, rank, world));
                EXPECT_GE(ranges.back().count(), shards / world);
                EXPECT_LE(ranges.back().count(), (shards + world - 1) / world);
            }
            expect_cover(ranges, shards);
            EXPECT_EQ(ranges.front().begin, 0);
            EXPECT_FALSE(ranges.front().empty()) << "it chooses the exponents for all";
        }
    }
}

TEST(Placement, RowsAreCutAtSolveBlocks) {
    for (const int world : kWorlds) {
        for (const std::int64_t rows : {1, 63, 64, 65, 192, 960, 1000, 8192}) {
            const auto ranges = solve_ranges(rows, world);
            ASSERT_EQ(ranges.size(), static_cast<std::size_t>(world));
            expect_cover(ranges, rows);
            const std::int64_t blocks = (rows + kSolveRowBlock - 1) / kSolveRowBlock;
            for (const RowRange& range : ranges) {
                if (range.empty()) continue;
                EXPECT_EQ(range.begin % kSolveRowBlock, 0);
                EXPECT_TRUE(range.end % kSolveRowBlock == 0 || range.end == rows);
                EXPECT_LE(range.count(), (blocks + world - 1) / world * kSolveRowBlock);
            }
        }
    }
}

TEST(Placement, FactorsAreDealtInTurn) {
    for (const int world : kWorlds) {
        std::vector<int> load(static_cast<std::size_t>(world));
        for (int block = 0; block < 30; ++block) {
            for (std::size_t stage = 0; stage < 4; ++stage) {
                const int rank = factor_rank(block, stage, 4, world);
                ASSERT_TRUE(rank >= 0 && rank < world);
                ++load[static_cast<std::size_t>(rank)];
            }
        }
        const auto [least, most] = std::ranges::minmax(load);
        EXPECT_LE(most - least, 1);
    }
}

TEST(Placement, EveryOutputShardHasOneOwner) {
    for (const int world : kWorlds) {
        for (const std::size_t shards : {1U, 2U, 7U, 40U}) {
            std::multiset<std::size_t> owned;
            for (int rank = 0; rank < world; ++rank) {
                const auto mine = output_shards_of_rank(shards, rank, world);
                EXPECT_LE(mine.size(),
                          (shards + static_cast<std::size_t>(world) - 1) / static_cast<std::size_t>(world));
                owned.insert(mine.begin(), mine.end());
            }
            ASSERT_EQ(owned.size(), shards);
            for (std::size_t shard = 0; shard < shards; ++shard) EXPECT_EQ(owned.count(shard), 1U);
        }
    }
}

}  // namespace
}  // namespace quantmill
