#include "pipeline/hessian.h"

#include <algorithm>
#include <cmath>

namespace quantmill {
namespace {
constexpr int kResolvedBits = 36;
constexpr float kSmallestShare = 0x1p-20F;  // of the largest diagonal element
}  // namespace

FixedPointExponents choose_exponents(std::span<const float> diagonal, int headroom) {
    const float largest = *std::max_element(diagonal.begin(), diagonal.end());
    FixedPointExponents exponents;
    exponents.reserve(diagonal.size());
    for (const float element : diagonal) {
        // A column that is quiet in the first shard may be louder in others: leave it room.
        const float magnitude = largest > 0.0F ? std::max(element, kSmallestShare * largest) : 1.0F;
        exponents.push_back((kResolvedBits - headroom - std::ilogb(magnitude)) / 2);
    }
    return exponents;
}

HessianAccumulator::HessianAccumulator(Backend& backend, std::int64_t columns, std::int64_t shards)
    : backend_(backend),
      columns_(columns),
      limit_(0x1p62 / static_cast<double>(shards)),
      open_(backend, {columns, columns}, DType::f32, "Hessian of a batch shard"),
      sum_(backend, {columns * (columns + 1) / 2}, DType::i64, "fixed-point Hessian") {
    restart();
}

void HessianAccumulator::restart() {
    backend_.zero(open_);
    backend_.zero(sum_);
}

void HessianAccumulator::add(ConstTensorView x) { backend_.accumulate_hessian(x, open_); }

std::vector<float> HessianAccumulator::open_diagonal() { return backend_.read_diagonal(open_); }

bool HessianAccumulator::close_shard(const FixedPointExponents& exponents) {
    // |h_ij| <= sqrt(h_ii h_jj): when the diagonal fits, everything does.
    const std::vector<float> diagonal = open_diagonal();
    for (std::size_t j = 0; j < diagonal.size(); ++j) {
        if (!(std::ldexp(static_cast<double>(diagonal[j]), 2 * exponents[j]) <= limit_)) return false;
    }
    backend_.add_fixed_point(open_, exponents, sum_);
    backend_.zero(open_);
    return true;
}

std::size_t HessianAccumulator::bytes(std::int64_t columns) {
    const auto n = static_cast<std::size_t>(columns);
    return n * n * sizeof(float) + n * (n + 1) / 2 * sizeof(std::int64_t);
}

}  // namespace quantmill
