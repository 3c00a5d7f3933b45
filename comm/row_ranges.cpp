#include "comm/row_ranges.h"

#include <algorithm>
#include <vector>

namespace quantmill {

void require_disjoint(std::span<const RowRange> ranges, int ranks, const Shape& shape) {
    if (static_cast<int>(ranges.size()) != ranks) {
        throw InternalError("{} row ranges for {} ranks", ranges.size(), ranks);
    }
    std::vector<RowRange> ordered(ranges.begin(), ranges.end());
    std::erase_if(ordered, [](const RowRange& range) { return range.empty(); });
    std::sort(ordered.begin(), ordered.end(),
              [](const RowRange& a, const RowRange& b) { return a.begin < b.begin; });
    std::int64_t next = 0;
    for (const RowRange& range : ordered) {
        if (range.begin < next || range.end < range.begin || range.end > shape[0]) {
            throw InternalError("rows [{}, {}) of {} overlap another rank's or do not exist", range.begin,
                                range.end, to_string(shape));
        }
        next = range.end;
    }
}

void require_integers(const TensorView& sum) {
    if (sum.dtype() != DType::i64) {
        throw InternalError("all_sum over {} values: only integer sums are the same on any number of ranks",
                            name_of(sum.dtype()));
    }
}

}  // namespace quantmill
