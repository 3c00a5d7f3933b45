#include "workers/placement.h"

#include <algorithm>
#include <numeric>

namespace quantmill {
namespace {

RowRange even_share(std::int64_t count, int rank, int world_size) {
    return {count * rank / world_size, count * (rank + 1) / world_size};
}

}  // namespace

RowRange shards_of_rank(std::int64_t shards, int rank, int world_size) {
    // Rounding up gives the first shard to rank 0 also when there are more ranks than shards.
    const auto bound = [&](std::int64_t r) { return (shards * r + world_size - 1) / world_size; };
    return {bound(rank), bound(rank + 1)};
}

std::vector<RowRange> solve_ranges(std::int64_t rows, int world_size) {
    const std::int64_t blocks = (rows + kSolveRowBlock - 1) / kSolveRowBlock;
    std::vector<RowRange> ranges;
    for (int rank = 0; rank < world_size; ++rank) {
        const RowRange share = even_share(blocks, rank, world_size);
        ranges.push_back(
            {std::min(share.begin * kSolveRowBlock, rows), std::min(share.end * kSolveRowBlock, rows)});
    }
    return ranges;
}

int factor_rank(int block, std::size_t stage, std::size_t stages, int world_size) {
    return static_cast<int>((static_cast<std::size_t>(block) * stages + stage) %
                            static_cast<std::size_t>(world_size));
}

std::vector<int> longest_first(const std::vector<double>& costs, int ranks) {
    std::vector<std::size_t> order(costs.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
    std::vector<double> load(static_cast<std::size_t>(ranks), 0.0);
    std::vector<int> owners(costs.size());
    for (const std::size_t task : order) {
        const auto least = std::min_element(load.begin(), load.end());
        owners[task] = static_cast<int>(least - load.begin());
        *least += costs[task];
    }
    return owners;
}

std::vector<std::size_t> output_shards_of_rank(std::size_t shards, int rank, int world_size) {
    std::vector<std::size_t> owned;
    for (auto shard = static_cast<std::size_t>(rank); shard < shards;
         shard += static_cast<std::size_t>(world_size)) {
        owned.push_back(shard);
    }
    return owned;
}

}  // namespace quantmill
