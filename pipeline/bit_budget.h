#pragma once

#include <cstdint>
#include <vector>

namespace quantmill {

// One way to store a LinearGroup.
struct BitOption {
    int bits = 0;
    std::uint64_t stored_bits = 0;  // all its tensors
    double loss = 0.0;              // what it adds to the model's
};

// Picks an option for each group so that all together take at most `budget` bits and the sum of their losses
// is small: the optimum of the Lagrangian relaxation, whose slack is then filled by the best upgrades that
// fit. At most one upgrade's gain away from the true optimum. Options of a group are sorted by size; ties go
// to the first group, so that all ranks agree. Throws BadInput when the smallest options exceed the budget.
std::vector<std::size_t> choose_options(const std::vector<std::vector<BitOption>>& groups,
                                        std::uint64_t budget);

double loss_of(const std::vector<std::vector<BitOption>>& groups, const std::vector<std::size_t>& choice);
std::uint64_t stored_bits_of(const std::vector<std::vector<BitOption>>& groups,
                             const std::vector<std::size_t>& choice);

}  // namespace quantmill
