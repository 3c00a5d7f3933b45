#include "pipeline/statistics.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace quantmill {

std::optional<Interval> bootstrap(std::size_t sequences, const Statistic& statistic) {
    if (sequences < 2) return std::nullopt;
    // The remainder, not std::uniform_int_distribution, whose numbers differ between libraries; its bias is
    // below sequences / 2^64.
    std::mt19937_64 random(kBootstrapSeed);
    std::vector<double> values;
    std::vector<double> weights(sequences);
    for (int resample = 0; resample < kBootstrapResamples; ++resample) {
        std::fill(weights.begin(), weights.end(), 0.0);
        for (std::size_t draw = 0; draw < sequences; ++draw) weights[random() % sequences] += 1.0;
        values.push_back(statistic(weights));
    }
    return Interval{quantile(values, 0.025), quantile(values, 0.975)};
}

double token_mean(std::span<const double> weights, std::span<const double> sums,
                  std::span<const double> tokens) {
    double sum = 0.0;
    double count = 0.0;
    for (std::size_t s = 0; s < weights.size(); ++s) {
        sum += weights[s] * sums[s];
        count += weights[s] * tokens[s];
    }
    return sum / count;
}

double quantile(std::vector<double> values, double p) {
    std::sort(values.begin(), values.end());
    const double place = p * static_cast<double>(values.size() - 1);
    const auto below = static_cast<std::size_t>(std::floor(place));
    const std::size_t above = std::min(below + 1, values.size() - 1);
    return std::lerp(values[below], values[above], place - static_cast<double>(below));
}

}  // namespace quantmill
