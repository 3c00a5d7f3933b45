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

HessianAccumulator::HessianAccumulator(Backend& backend, std::int64_t columns, std::int64_t shards)
    : backend_(backend), columns_(columns), limit_(0x1p62 / static_cast<double>(shards)) {
    restart();
}

void HessianAccumulator::add(ConstTensorView x) { backend_.accumulate_hessian(x, open_); }

std::vector<float> HessianAccumulator::open_diagonal() { return backend_.read_diagonal(open_); }

Tensor& HessianAccumulator::level(int index) {
    Tensor& sum = sums_.at(static_cast<std::size_t>(index));
    if (sum.empty()) {
        sum = backend_.empty({columns_ * (columns_ + 1) / 2}, DType::i64, "fixed-point Hessian");
        backend_.zero(sum);
    }
    return sum;
}

bool HessianAccumulator::close_shard(const FixedPointExponents& exponents) {
    // |h_ij| <= sqrt(h_ii h_jj): when the diagonal fits, everything does.
    const std::vector<float> diagonal = open_diagonal();
    for (int index = 0; index < kLevels; ++index) {
        const FixedPointExponents of_level = lowered(exponents, index);
        if (!fits(diagonal, of_level, limit_)) continue;
        backend_.add_fixed_point(open_, of_level, level(index));
        backend_.zero(open_);
        return true;
    }
    return false;
}

unsigned HessianAccumulator::levels() const {
    unsigned levels = 0;
    for (unsigned index = 0; index < kLevels; ++index) levels |= sums_[index].empty() ? 0U : 1U << index;
    return levels;
}

void HessianAccumulator::require_levels(unsigned levels) {
    for (int index = 0; index < kLevels; ++index) {
        if ((levels >> static_cast<unsigned>(index) & 1U) != 0) level(index);
    }
}

void HessianAccumulator::merge_levels(FixedPointExponents& exponents) {
    const int highest = static_cast<int>(std::bit_width(levels())) - 1;
    if (highest == 0) return;
    const FixedPointExponents target = lowered(exponents, highest);
    for (int index = 0; index < highest; ++index) {
        Tensor& sum = sums_[static_cast<std::size_t>(index)];
        if (sum.empty()) continue;
        backend_.from_fixed_point(sum, lowered(exponents, index), 1.0, open_);
        backend_.add_fixed_point(open_, target, level(highest));
        sum = {};
    }
    exponents = target;
}

TensorView HessianAccumulator::sum() {
    if (std::popcount(levels()) != 1) throw InternalError("the levels of a Hessian have not been merged");
    return sums_[static_cast<std::size_t>(std::bit_width(levels()) - 1)];
}

void HessianAccumulator::release() {
    open_ = {};
    sums_ = {};
}

void HessianAccumulator::restart() {
    release();
    open_ = backend_.empty({columns_, columns_}, DType::f32, "Hessian of a batch shard");
    backend_.zero(open_);
    level(0);
}

std::size_t HessianAccumulator::bytes(std::int64_t columns) {
    const auto n = static_cast<std::size_t>(columns);
    return n * n * sizeof(float) + n * (n + 1) / 2 * sizeof(std::int64_t);
}

}  // namespace quantmill
