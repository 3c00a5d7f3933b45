#include "pipeline/hessian.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace quantmill {
namespace {
constexpr int kResolvedBits = 36;
constexpr float kSmallestShare = 0x1p-20F;  // of the largest diagonal element
constexpr int kLevelStep = 6;               // exponents of a level are this much below the last one's

FixedPointExponents lowered(FixedPointExponents exponents, int levels) {
    for (std::int32_t& exponent : exponents) exponent -= kLevelStep * levels;
    return exponents;
}

bool fits(std::span<const float> diagonal, const FixedPointExponents& exponents, double limit) {
    for (std::size_t j = 0; j < diagonal.size(); ++j) {
        if (!(std::ldexp(static_cast<double>(diagonal[j]), 2 * exponents[j]) <= limit)) return false;
    }
    return true;
}

}  // namespace

FixedPointExponents choose_exponents(std::span<const float> diagonal) {
    const float largest = *std::max_element(diagonal.begin(), diagonal.end());
    FixedPointExponents exponents;
    exponents.reserve(diagonal.size());
    for (const float element : diagonal) {
        // A column that is quiet in the first shard may be louder in others: leave it room.
        const float magnitude = largest > 0.0F ? std::max(element, kSmallestShare * largest) : 1.0F;
        exponents.push_back((kResolvedBits - std::ilogb(magnitude)) / 2);
    }
    return exponents;
}

ShardAccumulator::ShardAccumulator(Backend& backend, std::int64_t columns, std::int64_t shards,
                                   Elements elements)
    : backend_(backend),
      columns_(columns),
      limit_(0x1p62 / static_cast<double>(shards)),
      elements_(elements) {
    restart();
}

void ShardAccumulator::add_fixed_point(const FixedPointExponents& exponents, TensorView sum) {
    if (elements_ == Elements::all) return backend_.add_fixed_point_full(open_, exponents, sum);
    backend_.add_fixed_point(open_, exponents, sum);
}

void ShardAccumulator::from_fixed_point(ConstTensorView sum, const FixedPointExponents& exponents,
                                        double factor) {
    if (elements_ == Elements::all) return backend_.from_fixed_point_full(sum, exponents, factor, open_);
    backend_.from_fixed_point(sum, exponents, factor, open_);
}

Tensor& ShardAccumulator::level(int index) {
    Tensor& sum = sums_.at(static_cast<std::size_t>(index));
    if (sum.empty()) {
        const Shape shape =
            elements_ == Elements::all ? Shape{columns_, columns_} : Shape{columns_ * (columns_ + 1) / 2};
        sum = backend_.empty(shape, DType::i64, "fixed-point sum over batch shards");
        backend_.zero(sum);
    }
    return sum;
}

void ShardAccumulator::close_at(int level, const FixedPointExponents& exponents) {
    add_fixed_point(lowered(exponents, level), this->level(level));
    backend_.zero(open_);
}

unsigned ShardAccumulator::levels() const {
    unsigned levels = 0;
    for (unsigned index = 0; index < kLevels; ++index) levels |= sums_[index].empty() ? 0U : 1U << index;
    return levels;
}

void ShardAccumulator::require_levels(unsigned levels) {
    for (int index = 0; index < kLevels; ++index) {
        if ((levels >> static_cast<unsigned>(index) & 1U) != 0) level(index);
    }
}

void ShardAccumulator::merge_levels(FixedPointExponents& exponents) {
    const int highest = static_cast<int>(std::bit_width(levels())) - 1;
    if (highest == 0) return;
    const FixedPointExponents target = lowered(exponents, highest);
    for (int index = 0; index < highest; ++index) {
        Tensor& sum = sums_[static_cast<std::size_t>(index)];
        if (sum.empty()) continue;
        from_fixed_point(sum, lowered(exponents, index), 1.0);
        add_fixed_point(target, level(highest));
        sum = {};
    }
    exponents = target;
}

TensorView ShardAccumulator::sum() {
    if (std::popcount(levels()) != 1) throw InternalError("the levels of a sum have not been merged");
    return sums_[static_cast<std::size_t>(std::bit_width(levels()) - 1)];
}

void ShardAccumulator::release() {
    open_ = {};
    sums_ = {};
}

void ShardAccumulator::restart() {
    release();
    open_ = backend_.empty({columns_, columns_}, DType::f32, "sum of a batch shard");
    backend_.zero(open_);
    level(0);
}

HessianAccumulator::HessianAccumulator(Backend& backend, std::int64_t columns, std::int64_t shards)
    : ShardAccumulator(backend, columns, shards, Elements::triangle),
      diagonal_(static_cast<std::size_t>(columns), 0.0F) {}

bool HessianAccumulator::add(ConstTensorView x) {
    backend().accumulate_hessian(x, open());
    // Now, while x is there to be looked at. A shard has few micro-batches, one on most GPUs.
    diagonal_ = backend().read_diagonal(open());
    return std::ranges::all_of(diagonal_, [](float element) { return std::isfinite(element); });
}

std::int64_t HessianAccumulator::first_refused(ConstTensorView x, const Sequences& sequences) {
    for (std::int64_t s = 0; s < sequences.count(); ++s) {
        const auto first = static_cast<std::size_t>(s);
        backend().zero(open());
        if (!add(x.rows(sequences.offsets[first], sequences.offsets[first + 1]))) return s;
    }
    return sequences.count();
}

bool HessianAccumulator::close_shard(const FixedPointExponents& exponents) {
    // |h_ij| <= sqrt(h_ii h_jj): when the diagonal fits, everything does.
    for (int index = 0; index < kLevels; ++index) {
        if (!fits(diagonal_, lowered(exponents, index), limit())) continue;
        close_at(index, exponents);
        return true;
    }
    return false;
}

std::size_t HessianAccumulator::bytes(std::int64_t columns) {
    const auto n = static_cast<std::size_t>(columns);
    return n * n * sizeof(float) + n * (n + 1) / 2 * sizeof(std::int64_t);
}

CrossAccumulator::CrossAccumulator(Backend& backend, std::int64_t columns, std::int64_t shards)
    : ShardAccumulator(backend, columns, shards, Elements::all) {}

void CrossAccumulator::add(TensorView original, ConstTensorView x) {
    backend().accumulate_cross(original, x, open());
}

bool CrossAccumulator::close_shard(const FixedPointExponents& exponents) {
    double largest = backend().largest_fixed_point(open(), exponents);
    for (int index = 0; index < kLevels; ++index, largest *= std::ldexp(1.0, -2 * kLevelStep)) {
        if (largest > limit()) continue;
        close_at(index, exponents);
        return true;
    }
    return false;
}

void CrossAccumulator::finish(FixedPointExponents exponents, double factor) {
    merge_levels(exponents);
    from_fixed_point(sum(), exponents, factor);
    release_sums();
}

std::size_t CrossAccumulator::bytes(std::int64_t columns) {
    const auto n = static_cast<std::size_t>(columns);
    return n * n * (sizeof(float) + sizeof(std::int64_t));
}

}  // namespace quantmill
