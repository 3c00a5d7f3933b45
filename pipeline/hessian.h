#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"

namespace quantmill {

// Powers of two, one a column, that fix the fixed point of a Hessian's sum: element (i, j) of a shard counts
// in units of 2^−(e_i + e_j).
using FixedPointExponents = std::vector<std::int32_t>;

// Exponents from the diagonal of the job's first shard: 2^-36 of its magnitudes is resolved.
FixedPointExponents choose_exponents(std::span<const float> diagonal);

// Sums a matrix of the shards that this rank owns. A shard is accumulated in fp32, in the fixed order of its
// micro-batches, then added to an exact fixed-point sum: so the total over shards and ranks does not depend
// on who computed which (docs/algorithm.md, "The same bytes"). A shard that is too loud for the exponents
// goes into a sum of a higher level, which resolves less; its level depends on the shard alone.
class ShardAccumulator {
public:
    static constexpr int kLevels = 4;

    // Bit l: level l has a sum. All ranks must have the same levels before they are summed over ranks.
    unsigned levels() const;
    void require_levels(unsigned levels);
    // Calls visit(sum), a sum of i64, for each level from the lowest.
    template <class Visit>
    void for_each_sum(const Visit& visit) {
        for (Tensor& sum : sums_) {
            if (!sum.empty()) visit(sum.view());
        }
    }
    // Adds the lower levels to the highest and turns `exponents` into those of what is left: sum().
    void merge_levels(FixedPointExponents& exponents);
    TensorView sum();  // of the only level

    // f32 [C, C], free once all shards are closed.
    TensorView workspace() { return open_; }

    void release();  // frees all memory: another rank has the sum
    void restart();  // begins anew, with sum() zero, also after release()

protected:
    enum class Elements : std::uint8_t { triangle, all };
    ShardAccumulator(Backend& backend, std::int64_t columns, std::int64_t shards, Elements elements);

    Backend& backend() { return backend_; }
    TensorView open() { return open_; }
    double limit() const { return limit_; }  // of a shard's elements in fixed point
    void close_at(int level, const FixedPointExponents& exponents);
    void from_fixed_point(ConstTensorView sum, const FixedPointExponents& exponents, double factor);
    void release_sums() { sums_ = {}; }

private:
    void add_fixed_point(const FixedPointExponents& exponents, TensorView sum);
    // Makes the sum of a level exist.
    Tensor& level(int index);

    Backend& backend_;
    std::int64_t columns_;
    double limit_;
    Elements elements_;
    Tensor open_;  // f32 [C, C]
    std::array<Tensor, kLevels> sums_;
};

// XᵀX: the lower triangle, sums i64 [C(C+1)/2].
class HessianAccumulator : public ShardAccumulator {
public:
    HessianAccumulator(Backend& backend, std::int64_t columns, std::int64_t shards);

    // One micro-batch of the open shard. Returns false when the shard is not finite any more: x has NaN or
    // infinities, or elements whose squares fp32 does not hold.
    [[nodiscard]] bool add(ConstTensorView x);
    // The first of the sequences of which x, a micro-batch, consists that add() would refuse alone; their
    // count when it is none. For a message: the open shard is lost.
    std::int64_t first_refused(ConstTensorView x, const Sequences& sequences);
    // The diagonal of the open shard; every rank needs the first shard's to choose exponents.
    const std::vector<float>& open_diagonal() const { return diagonal_; }
    // Adds the open shard to the sum of its level and opens the next. Returns false when no level holds it:
    // it is 2^36 times as loud as the first shard, or not finite.
    [[nodiscard]] bool close_shard(const FixedPointExponents& exponents);

    static std::size_t bytes(std::int64_t columns);

private:
    std::vector<float> diagonal_;  // of what add() has seen of the open shard
};

// (X − X̃)ᵀX̃, where X̃ is the input that a linear will see and X that of the original model; sums i64 [C, C].
// It takes the exponents of X̃'s Hessian.
class CrossAccumulator : public ShardAccumulator {
public:
    CrossAccumulator(Backend& backend, std::int64_t columns, std::int64_t shards);

    void add(TensorView original, ConstTensorView x);  // one micro-batch; leaves the difference in `original`
    [[nodiscard]] bool close_shard(const FixedPointExponents& exponents);  // as of a Hessian
    // All levels, times `factor`, in workspace(); frees the sums.
    void finish(FixedPointExponents exponents, double factor);

    static std::size_t bytes(std::int64_t columns);
};

}  // namespace quantmill
