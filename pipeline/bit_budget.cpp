#include "pipeline/bit_budget.h"

#include <optional>

#include "kernels/error.h"

namespace quantmill {
namespace {

struct Upgrade {
    std::size_t group = 0, option = 0;
    double gain_per_bit = 0.0;
};

// The steepest way up from an option: the next vertex of the lower convex hull.
std::optional<Upgrade> steepest(const std::vector<BitOption>& options, std::size_t group, std::size_t from,
                                std::uint64_t room) {
    std::optional<Upgrade> best;
    for (std::size_t to = from + 1; to < options.size(); ++to) {
        const std::uint64_t cost = options[to].stored_bits - options[from].stored_bits;
        const double gain = options[from].loss - options[to].loss;
        if (cost > room || gain <= 0.0) continue;
        const double rate = gain / static_cast<double>(cost);
        if (!best || rate > best->gain_per_bit) best = {group, to, rate};
    }
    return best;
}

std::optional<Upgrade> best_upgrade(const std::vector<std::vector<BitOption>>& groups,
                                    const std::vector<std::size_t>& choice, std::uint64_t room) {
    std::optional<Upgrade> best;
    for (std::size_t g = 0; g < groups.size(); ++g) {
        const auto upgrade = steepest(groups[g], g, choice[g], room);
        if (upgrade && (!best || upgrade->gain_per_bit > best->gain_per_bit)) best = upgrade;
    }
    return best;
}

}  // namespace

std::vector<std::size_t> choose_options(const std::vector<std::vector<BitOption>>& groups,
                                        std::uint64_t budget) {
    std::vector<std::size_t> choice(groups.size(), 0);
    std::uint64_t used = stored_bits_of(groups, choice);
    if (used > budget) {
        throw BadInput("the fewest bits take {} bits, more than the budget of {}", used, budget);
    }
    while (const auto upgrade = best_upgrade(groups, choice, budget - used)) {
        used += groups[upgrade->group][upgrade->option].stored_bits -
                groups[upgrade->group][choice[upgrade->group]].stored_bits;
        choice[upgrade->group] = upgrade->option;
    }
    return choice;
}

double loss_of(const std::vector<std::vector<BitOption>>& groups, const std::vector<std::size_t>& choice) {
    double loss = 0.0;
    for (std::size_t g = 0; g < groups.size(); ++g) loss += groups[g][choice[g]].loss;
    return loss;
}

std::uint64_t stored_bits_of(const std::vector<std::vector<BitOption>>& groups,
                             const std::vector<std::size_t>& choice) {
    std::uint64_t bits = 0;
    for (std::size_t g = 0; g < groups.size(); ++g) bits += groups[g][choice[g]].stored_bits;
    return bits;
}

}  // namespace quantmill
