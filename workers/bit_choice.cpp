#include "workers/bit_choice.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "jobs/module_pattern.h"
#include "pipeline/bit_budget.h"
#include "pipeline/gptq_format.h"
#include "pipeline/stopwatch.h"
#include "workers/layer_run.h"

namespace quantmill {
namespace {

constexpr int kBits[] = {2, 3, 4, 8};

bool may_choose(const QuantizationSpec& spec, int bits) {
    return spec.target_choices.find(std::to_string(bits)) != std::string::npos;
}

// What the log of the perplexity gains for a loss, of one small model (docs/quality.md).
constexpr double kNatsPerLoss = 2.0;

std::uint64_t stored_bits_of_group(const LinearGroup& group, const QuantizationGrid& grid) {
    std::uint64_t bytes = 0;
    for (const Linear& linear : group.linears) {
        for (const StoredTensor& tensor : gptq_tensors(linear.name, linear.rows, linear.columns, grid)) {
            bytes += static_cast<std::uint64_t>(tensor.count()) * (tensor.dtype == "F16" ? 2 : 4);
        }
    }
    return 8 * bytes;
}

std::uint64_t weights_of(const LinearGroup& group) {
    return static_cast<std::uint64_t>(group.rows() * group.columns());
}

}  // namespace

BitChoiceMaker::BitChoiceMaker(const JobSpec& spec, const ModelGraph& graph, const QuantizationScheme& scheme)
    : graph_(graph), scheme_(scheme), target_(spec.quantization.target_bits.value()) {
    const GptqFormat format = gptq_format_from(spec.output.format);
    std::vector<ModulePattern> rules;
    for (const QuantizationRule& rule : spec.quantization.overrides) rules.emplace_back(rule.match);
    for_each_quantized(
        graph, scheme,
        [&](int block, std::size_t stage, const LinearGroup& group, const GptqOptions& options) {
            if (block == graph.blocks) return;
            const std::string module = graph.in_block(block, group.linears.front().name);
            if (std::ranges::any_of(rules, [&](const auto& rule) { return rule.matches(module); })) {
                fixed_weights_ += weights_of(group);
                fixed_bits_ += stored_bits_of_group(group, grid_for(options.grid, group.columns()));
                return;
            }
            Group own{block, stage, {}};
            for (const int bits : kBits) {
                QuantizationGrid grid = grid_for(options.grid, group.columns());
                grid.bits = bits;
                const bool fits = may_choose(spec.quantization, bits) &&
                                  std::ranges::all_of(group.linears, [&](const Linear& linear) {
                                      return gptq_obstacle(linear.rows, linear.columns, grid, format).empty();
                                  });
                if (fits) own.bits.push_back(bits);
            }
            // Bits that no shape allows are a problem of the plan.
            if (own.bits.empty()) own.bits.push_back(options.grid.bits);
            own_weights_ += weights_of(group);
            groups_.push_back(std::move(own));
        });
}

std::uint64_t BitChoiceMaker::stored_bits(const Group& group, int bits) const {
    const LinearGroup& linears = graph_.stages[group.stage].group;
    QuantizationGrid grid = grid_for(scheme_.usual().grid, linears.columns());
    grid.bits = bits;
    return stored_bits_of_group(linears, grid);
}

std::uint64_t BitChoiceMaker::budget() const {
    const auto all =
        static_cast<std::uint64_t>(std::floor(target_ * static_cast<double>(own_weights_ + fixed_weights_)));
    std::uint64_t least = 0;
    for (const Group& group : groups_) least += stored_bits(group, group.bits.front());
    if (all >= fixed_bits_ + least) return all - fixed_bits_;
    throw BadInput(
        "quantization.target_bits: {}: the fewest bits that this job can store take {:.3f} bits a weight, "
        "with "
        "scales, zeros and g_idx: raise it, or quantization.group_size",
        target_,
        static_cast<double>(fixed_bits_ + least) / static_cast<double>(own_weights_ + fixed_weights_));
}

// The commonest bits become the usual ones: the fewer rules the checkpoint needs.
QuantizationScheme BitChoiceMaker::scheme_of(const std::vector<int>& bits) const {
    std::map<int, std::uint64_t> weights;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
        weights[bits[g]] += weights_of(graph_.stages[groups_[g].stage].group);
    }
    const auto commonest =
        std::ranges::max_element(weights, {}, [](const auto& entry) { return entry.second; });
    GptqOptions usual = scheme_.usual();
    if (commonest != weights.end()) usual.grid.bits = commonest->first;
    QuantizationScheme chosen(graph_, usual);
    for (int block = 0; block <= graph_.blocks; ++block) {
        for (std::size_t stage = 0; stage < graph_.stages_of(block).size(); ++stage) {
            chosen.set(block, stage, scheme_.options_at(block, stage));
        }
    }
    for (std::size_t g = 0; g < groups_.size(); ++g) {
        GptqOptions own = scheme_.usual();
        own.grid.bits = bits[g];
        chosen.set(groups_[g].block, groups_[g].stage, own);
    }
    return chosen;
}

QuantizationScheme BitChoiceMaker::provisional() const {
    std::vector<std::vector<BitOption>> options;
    for (const Group& group : groups_) {
        std::vector<BitOption>& own = options.emplace_back();
        for (const int bits : group.bits)
            own.push_back({bits, stored_bits(group, bits), std::pow(0.25, bits)});
    }
    const std::vector<std::size_t> choice = choose_options(options, budget());
    std::vector<int> bits;
    for (std::size_t g = 0; g < groups_.size(); ++g) bits.push_back(options[g][choice[g]].bits);
    return scheme_of(bits);
}

std::vector<QuantizationScheme> BitChoiceMaker::candidates() const {
    std::vector<QuantizationScheme> all;
    for (const int bits : kBits) {
        QuantizationScheme& candidate = all.emplace_back(graph_, scheme_.usual());
        for (int block = 0; block < graph_.blocks; ++block) {
            for (std::size_t stage = 0; stage < graph_.stages.size(); ++stage) {
                candidate.set(block, stage, std::nullopt);
            }
        }
        for (const Group& group : groups_) {
            if (std::ranges::find(group.bits, bits) == group.bits.end()) continue;
            // Refinement would change little of the order of losses, and other Hessians all of the time.
            GptqOptions options = scheme_.usual();
            options.grid.bits = bits;
            options.refit = false;
            options.sweeps = 0;
            options.error_propagation_alpha = 0.0;
            candidate.set(group.block, group.stage, options);
        }
    }
    return all;
}

QuantizationScheme BitChoiceMaker::choose(const std::vector<std::vector<LinearReport>>& measured,
                                          BitBudgetReport& report) const {
    std::map<std::pair<int, std::string>, std::map<int, double>> losses;
    for (const auto& linears : measured) {
        for (const LinearReport& linear : linears) {
            losses[{linear.block, linear.group}][linear.bits] = linear.block_error;
        }
    }
    std::vector<std::vector<BitOption>> options;
    for (const Group& group : groups_) {
        const std::string& name = graph_.stages[group.stage].group.name;
        std::vector<BitOption>& own = options.emplace_back();
        for (const int bits : group.bits) {
            own.push_back({bits, stored_bits(group, bits), losses.at({group.block, name}).at(bits)});
            report.uniform_loss[bits] += own.back().loss;
        }
    }
    const std::vector<std::size_t> choice = choose_options(options, budget());
    std::vector<int> bits;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
        const std::string& name = graph_.stages[groups_[g].stage].group.name;
        bits.push_back(options[g][choice[g]].bits);
        report.groups.push_back({groups_[g].block, name, bits.back(), losses.at({groups_[g].block, name})});
    }
    report.target = target_;
    report.predicted_loss = loss_of(options, choice);
    report.predicted_ratio = std::exp(kNatsPerLoss * report.predicted_loss);
    report.achieved = static_cast<double>(fixed_bits_ + stored_bits_of(options, choice)) /
                      static_cast<double>(own_weights_ + fixed_weights_);
    return scheme_of(bits);
}

std::vector<PreparedJob> jobs_to_measure(const PreparedJob& job) {
    std::vector<PreparedJob> jobs;
    const BitChoiceMaker maker(job.spec, job.graph, scheme_before_target(job));
    for (QuantizationScheme& candidate : maker.candidates()) {
        PreparedJob& measured = jobs.emplace_back(job);
        measured.measures = true;
        measured.spec.quantization.propagate = "original";
        measured.spec.calibration.hessians.clear();  // a store has no hidden states
        measured.spec.compute.layer_groups.reset();  // meant for the run itself
        measured.spec.calibration.save_hessians.clear();
        measured.scheme = std::move(candidate);
        measured.head = false;
    }
    return jobs;
}

namespace {

BitBudgetReport choose_for(PreparedJob& job, const World& world, Control& control, Backend& backend) {
    const Stopwatch watch;
    const BitChoiceMaker maker(job.spec, job.graph, scheme_before_target(job));
    const std::vector<PreparedJob> measured = jobs_to_measure(job);
    const LayerPlan layers = layers_of(measured, world, backend);
    Coordinator coordinator(control, job.spec.compute.stall_timeout, true);
    LayerRun run(measured, layers, control, backend, coordinator);
    const auto linears = run.run();
    coordinator.finish();
    BitBudgetReport report;
    job.scheme = maker.choose(linears, report);
    job.layout = plan_output(job.reader, job.graph, job.scheme, job.spec.output.max_shard_size);
    report.seconds = watch.seconds();
    return report;
}

}  // namespace

void choose_bits(std::vector<PreparedJob>& jobs, const World& world, Control& control, Backend& backend,
                 std::vector<std::optional<BitBudgetReport>>& reports) {
    reports.resize(jobs.size());
    for (std::size_t o = 0; o < jobs.size(); ++o) {
        if (!jobs[o].spec.quantization.target_bits) continue;
        spdlog::info("measuring what linears lose with 2, 3, 4 and 8 bits, for quantization.target_bits: {}",
                     *jobs[o].spec.quantization.target_bits);
        reports[o] = choose_for(jobs[o], world, control, backend);
    }
}

}  // namespace quantmill
