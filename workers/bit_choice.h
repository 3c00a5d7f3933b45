#pragma once

#include <vector>

#include "jobs/report.h"
#include "workers/layer_planner.h"
#include "workers/prepared_job.h"

namespace quantmill {

// What quantization.target_bits allows, and what of it each LinearGroup gets.
class BitChoiceMaker {
public:
    // `scheme`: of the job's other keys. Groups with its usual options get bits, the others keep their own.
    BitChoiceMaker(const JobSpec& spec, const ModelGraph& graph, const QuantizationScheme& scheme);

    // Before anything is measured: as if each bit less lost four times as much, everywhere alike. Has the
    // size of what will be chosen, almost. Throws BadInput when the target is out of reach.
    QuantizationScheme provisional() const;
    // Schemes to measure: those groups alone, all with one number of bits.
    std::vector<QuantizationScheme> candidates() const;
    // `measured`: the linears of each candidate. `report` tells the choice.
    QuantizationScheme choose(const std::vector<std::vector<LinearReport>>& measured,
                              BitBudgetReport& report) const;

private:
    struct Group {
        int block = 0;
        std::size_t stage = 0;
        std::vector<int> bits;  // that its shape can be stored with
    };
    std::uint64_t stored_bits(const Group& group, int bits) const;
    std::uint64_t budget() const;
    QuantizationScheme scheme_of(const std::vector<int>& bits) const;

    const ModelGraph& graph_;
    QuantizationScheme scheme_;
    double target_;
    std::vector<Group> groups_;
    std::uint64_t own_weights_ = 0;                     // of the groups
    std::uint64_t fixed_weights_ = 0, fixed_bits_ = 0;  // of those that keep their own
};

// The jobs that tell what a job with a target chooses from: one a candidate, with Hessians of the original
// model and nothing to write.
std::vector<PreparedJob> jobs_to_measure(const PreparedJob& job);

// Measures and chooses for the jobs that have a target, and gives them the schemes and layouts of the choice.
// Collective.
void choose_bits(std::vector<PreparedJob>& jobs, const World& world, Control& control, Backend& backend,
                 std::vector<std::optional<BitBudgetReport>>& reports);

}  // namespace quantmill
