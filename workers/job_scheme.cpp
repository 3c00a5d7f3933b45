#include "workers/job_scheme.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "jobs/module_pattern.h"
#include "kernels/error.h"
#include "workers/gptq_options.h"

namespace quantmill {
namespace {

// For a match that was hardly meant as a glob.
std::string regex_advice(const std::string& match) {
    if (match.starts_with(kRegexPrefix) || match.find_first_of("\\()|+^$") == std::string::npos) return "";
    return fmt::format("; a regular expression is written behind {}", kRegexPrefix);
}

class Rules {
public:
    Rules(const std::vector<QuantizationRule>& rules, bool bf16_model) : rules_(rules) {
        for (const QuantizationRule& rule : rules) {
            patterns_.emplace_back(rule.match);
            options_.push_back(rule.skip ? std::nullopt
                                         : std::optional(gptq_options(rule.quantization, bf16_model)));
        }
        matched_.resize(rules.size(), false);
        decided_.resize(rules.size(), false);
    }

    // What decides about a LinearGroup.
    std::optional<GptqOptions> decide(const ModelGraph& graph, int block, const LinearGroup& group,
                                      const GptqOptions& usual) {
        const std::string first = graph.in_block(block, group.linears.front().name);
        const std::size_t rule = first_match(first);
        const std::optional<GptqOptions> choice = choice_of(rule, usual);
        for (const Linear& linear : group.linears) {
            const std::string name = graph.in_block(block, linear.name);
            const std::size_t other = first_match(name);
            if (choice_of(other, usual) == choice) continue;
            const QuantizationRule& culprit = rules_[std::min(rule, other)];
            throw BadInput(
                "{}: quantization.overrides: match: {} treats {} and {} differently: those who serve the "
                "model "
                "fuse {} into one linear, so they need one scheme: match all of them, for example with {}",
                culprit.place, culprit.match, first, name, group.name, whole_group(group));
        }
        return choice;
    }

    // After all decisions: a rule without one is a mistake.
    void require_all_used(const std::string& example) const {
        for (std::size_t i = 0; i < rules_.size(); ++i) {
            if (decided_[i]) continue;
            if (!matched_[i])
                throw BadInput(
                    "{}: quantization.overrides: match: {} matches no linear of a block; it must match a "
                    "whole name, such as {}{}",
                    rules_[i].place, rules_[i].match, example, regex_advice(rules_[i].match));
            throw BadInput(
                "{}: quantization.overrides: match: {} decides about no linear: all that it matches are "
                "matched "
                "by earlier rules, and the first one counts",
                rules_[i].place, rules_[i].match);
        }
    }

private:
    std::size_t first_match(const std::string& module) {
        std::size_t first = rules_.size();
        for (std::size_t i = 0; i < patterns_.size(); ++i) {
            if (!patterns_[i].matches(module)) continue;
            matched_[i] = true;
            first = std::min(first, i);
        }
        if (first < rules_.size()) decided_[first] = true;
        return first;
    }

    std::optional<GptqOptions> choice_of(std::size_t rule, const GptqOptions& usual) const {
        return rule < rules_.size() ? options_[rule] : std::optional(usual);
    }

    static std::string whole_group(const LinearGroup& group) {
        const std::string& name = group.linears.front().name;
        std::vector<std::string> names;
        for (const Linear& linear : group.linears) {
            names.push_back(linear.name.substr(linear.name.rfind('.') + 1));
        }
        return fmt::format("{}.*{}\\.({})", kRegexPrefix, name.substr(0, name.rfind('.')),
                           fmt::join(names, "|"));
    }

    const std::vector<QuantizationRule>& rules_;
    std::vector<ModulePattern> patterns_;
    std::vector<std::optional<GptqOptions>> options_;
    std::vector<bool> matched_, decided_;
};

}  // namespace

QuantizationScheme scheme_of_job(const JobSpec& spec, const ModelGraph& graph, bool bf16_model) {
    const QuantizationSpec& quantization = spec.quantization;
    const GptqOptions usual = gptq_options(quantization, bf16_model);
    QuantizationScheme scheme(graph, usual);
    Rules rules(quantization.overrides, bf16_model);
    for (int block = 0; block < graph.blocks; ++block) {
        for (std::size_t stage = 0; stage < graph.stages.size(); ++stage) {
            scheme.set(block, stage, rules.decide(graph, block, graph.stages[stage].group, usual));
        }
    }
    rules.require_all_used(graph.in_block(0, graph.stages.front().group.linears.front().name));
    if (quantization.lm_head_bits) {
        GptqOptions head = usual;
        head.grid.bits = *quantization.lm_head_bits;
        head.grid.group_size = quantization.lm_head_group_size.value_or(quantization.group_size);
        scheme.set(graph.blocks, 0, head);
    }
    return scheme;
}

}  // namespace quantmill
