#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/statistics.h"

namespace quantmill {

// What an evaluation found of each sequence: sums over its predicted tokens.
struct SequenceSums {
    std::vector<std::string> fingerprints;  // of the sequences (pipeline/fingerprint.h)
    std::vector<double> tokens;             // that were predicted
    std::vector<double> negative_log;       // −log p of the token that followed, nats
    // Empty without a reference:
    std::vector<double> reference_negative_log;
    std::vector<double> divergence;  // from the reference, nats
    std::vector<double> same_top;    // tokens at which both models expect the same
};

// The result of `quantmill eval`, defined in docs/evaluation.md.
struct Evaluation {
    std::string model, reference;  // directories; no reference: empty
    std::string architecture, source, version, backend;
    SequenceSums sums;
    std::vector<double> hidden_errors;  // of each block, ||h − h_ref|| / ||h_ref||; empty without a reference
    // Perplexity over the reference's, as the budget of bits that made the model expected it.
    std::optional<double> predicted_ratio;
    std::uint64_t model_bytes = 0;
    double bits_per_weight = 0.0;  // of the linears of all blocks, all overhead counted
    double seconds = 0.0;
    bool has_reference() const { return !reference.empty(); }
};

struct Estimate {
    double value = 0.0;
    std::optional<Interval> interval;
};
Estimate perplexity_of(const SequenceSums& sums);
Estimate reference_perplexity_of(const SequenceSums& sums);
Estimate divergence_of(const SequenceSums& sums);  // mean over tokens
Estimate agreement_of(const SequenceSums& sums);   // share of tokens
// perplexity of b − perplexity of a, on the same resamples of the same sequences.
Estimate perplexity_difference(const SequenceSums& a, const SequenceSums& b);

nlohmann::ordered_json to_json(const Evaluation& evaluation);
// As a file: indented; bytes of a path that are not UTF-8 are replaced.
std::string json_text(const nlohmann::ordered_json& json);
// The inverse. Throws BadInput naming `file` for what `quantmill eval --json` did not write.
Evaluation evaluation_from(const nlohmann::json& json, const std::string& file);

// What the terminal shows of one evaluation, and of two side by side.
std::string evaluation_text(const Evaluation& evaluation);
// Throws BadInput when they are not of the same sequences.
std::string comparison_text(const Evaluation& a, const Evaluation& b);
nlohmann::ordered_json comparison_json(const Evaluation& a, const Evaluation& b);

}  // namespace quantmill
