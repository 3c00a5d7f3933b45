#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

namespace quantmill {

// A 95% confidence interval.
struct Interval {
    double low = 0.0;
    double high = 0.0;
};

// The bootstrap over sequences (docs/evaluation.md): the same resamples for any statistic of as many
// sequences, on any machine, so that two models that saw the same sequences can be compared in pairs.
inline constexpr std::uint64_t kBootstrapSeed = 20261125;
inline constexpr int kBootstrapResamples = 2000;

// weights[s]: how often a resample drew sequence s; they add up to the number of sequences.
using Statistic = std::function<double(std::span<const double> weights)>;

// The 2.5% and 97.5% percentiles of a statistic over the resamples, interpolated between neighbours. Nothing
// for fewer than two sequences, which say nothing about their spread.
std::optional<Interval> bootstrap(std::size_t sequences, const Statistic& statistic);

// Σ w v / Σ w n: the mean over tokens of what each sequence sums over its n tokens.
double token_mean(std::span<const double> weights, std::span<const double> sums,
                  std::span<const double> tokens);

// The p-quantile, 0 <= p <= 1, of values that are not empty: at p (n - 1), interpolated.
double quantile(std::vector<double> values, double p);

}  // namespace quantmill
