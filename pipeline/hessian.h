#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"

namespace quantmill {

// Powers of two, one a column, that fix the fixed point of a Hessian's sum: element (i, j) of a shard counts
// in units of 2^−(e_i + e_j).
using FixedPointExponents = std::vector<std::int32_t>;

// Exponents from the diagonal of the job's first shard: 2^-34 of its magnitudes is resolved, and `headroom`
// more bits than the 22 left are taken from the resolution when an earlier attempt overflowed.
FixedPointExponents choose_exponents(std::span<const float> diagonal, int headroom);

// Sums XᵀX of the shards that this rank owns. A shard is accumulated in fp32, in the fixed order of its
// micro-batches, then added to an exact fixed-point sum: so the total over shards and ranks does not depend
// on who computed which (docs/algorithm.md, "The same bytes").
class HessianAccumulator {
public:
    HessianAccumulator(Backend& backend, std::int64_t columns, std::int64_t shards);

    std::int64_t columns() const { return columns_; }
    void add(ConstTensorView x);  // x [T, C], activation dtype: one micro-batch of the open shard
    // The diagonal of the open shard; every rank needs the first shard's to choose exponents.
    std::vector<float> open_diagonal();
    // Adds the open shard to the sum and opens the next. Returns false when it does not fit; a matter of the
    // shard and the exponents alone, so the same shard fails on any placement.
    [[nodiscard]] bool close_shard(const FixedPointExponents& exponents);
    TensorView sum() { return sum_; }  // i64 [C(C+1)/2]
    // f32 [C, C], free for the factor once all shards are closed.
    TensorView workspace() { return open_; }
    void restart();  // forgets everything

    static std::size_t bytes(std::int64_t columns);

private:
    Backend& backend_;
    std::int64_t columns_;
    double limit_;  // of a shard's diagonal in fixed point
    Tensor open_;   // f32 [C, C], lower triangle
    Tensor sum_;
};

}  // namespace quantmill
