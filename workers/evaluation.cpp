#include "workers/evaluation.h"

#include <fmt/format.h>

#include <cmath>

#include "jobs/text.h"
#include "kernels/error.h"

namespace quantmill {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

Estimate estimate(const SequenceSums& sums, const Statistic& statistic) {
    const std::vector<double> once(sums.tokens.size(), 1.0);
    return {statistic(once), bootstrap(sums.tokens.size(), statistic)};
}

Estimate mean_estimate(const SequenceSums& sums, const std::vector<double>& values) {
    return estimate(
        sums, [&](std::span<const double> weights) { return token_mean(weights, values, sums.tokens); });
}

Estimate exponential_mean(const SequenceSums& sums, const std::vector<double>& values) {
    return estimate(sums, [&](std::span<const double> weights) {
        return std::exp(token_mean(weights, values, sums.tokens));
    });
}

double sum_of(const std::vector<double>& values) {
    double sum = 0.0;
    for (const double value : values) sum += value;
    return sum;
}

ordered_json interval_json(const Estimate& estimate) {
    if (!estimate.interval) return nullptr;
    return {estimate.interval->low, estimate.interval->high};
}

std::string text_of(const Estimate& estimate, int digits) {
    std::string text = fmt::format("{:.{}f}", estimate.value, digits);
    if (estimate.interval) {
        text += fmt::format(" [{:.{}f}, {:.{}f}]", estimate.interval->low, digits, estimate.interval->high,
                            digits);
    }
    return text;
}

ordered_json sequences_json(const Evaluation& evaluation) {
    ordered_json sequences = {{"fingerprint", evaluation.sums.fingerprints},
                              {"tokens", evaluation.sums.tokens},
                              {"negative_log_likelihood", evaluation.sums.negative_log}};
    if (evaluation.has_reference()) {
        sequences["reference_negative_log_likelihood"] = evaluation.sums.reference_negative_log;
        sequences["kl_divergence"] = evaluation.sums.divergence;
        sequences["top1_agreement"] = evaluation.sums.same_top;
    }
    return sequences;
}

std::string share_text(const Estimate& estimate) {
    Estimate percent{100.0 * estimate.value, estimate.interval};
    if (percent.interval)
        percent.interval = Interval{100.0 * percent.interval->low, 100.0 * percent.interval->high};
    return text_of(percent, 2) + " %";
}

// The table of hidden-state errors: a row a block, a column an evaluation.
std::string hidden_error_table(const std::vector<const Evaluation*>& evaluations,
                               std::vector<std::string> header) {
    std::vector<std::vector<std::string>> rows{std::move(header)};
    for (std::size_t block = 0; block < evaluations.front()->hidden_errors.size(); ++block) {
        rows.push_back({std::to_string(block)});
        for (const Evaluation* evaluation : evaluations) {
            rows.back().push_back(fmt::format("{:.3e}", evaluation->hidden_errors[block]));
        }
    }
    return table_text(rows, std::string(evaluations.size() + 1, 'r'));
}

void require_same_sequences(const Evaluation& a, const Evaluation& b) {
    if (a.sums.fingerprints == b.sums.fingerprints && a.sums.tokens == b.sums.tokens) return;
    throw BadInput(
        "{} and {} were evaluated on different sequences ({} and {}), so their numbers cannot be compared: "
        "evaluate both with the same --tokens or --text and --sequence-length",
        a.model, b.model, a.sums.fingerprints.size(), b.sums.fingerprints.size());
}

bool same_reference(const Evaluation& a, const Evaluation& b) {
    return a.has_reference() && b.has_reference() && a.hidden_errors.size() == b.hidden_errors.size();
}

}  // namespace

Estimate perplexity_of(const SequenceSums& sums) { return exponential_mean(sums, sums.negative_log); }

Estimate reference_perplexity_of(const SequenceSums& sums) {
    return exponential_mean(sums, sums.reference_negative_log);
}

Estimate divergence_of(const SequenceSums& sums) { return mean_estimate(sums, sums.divergence); }

Estimate agreement_of(const SequenceSums& sums) { return mean_estimate(sums, sums.same_top); }

Estimate perplexity_difference(const SequenceSums& a, const SequenceSums& b) {
    return estimate(a, [&](std::span<const double> weights) {
        return std::exp(token_mean(weights, b.negative_log, b.tokens)) -
               std::exp(token_mean(weights, a.negative_log, a.tokens));
    });
}

ordered_json to_json(const Evaluation& evaluation) {
    const Estimate perplexity = perplexity_of(evaluation.sums);
    ordered_json result = {{"model", evaluation.model},
                           {"architecture", evaluation.architecture},
                           {"perplexity", perplexity.value},
                           {"perplexity_interval", interval_json(perplexity)},
                           {"mean_negative_log_likelihood", std::log(perplexity.value)},
                           {"tokens", static_cast<std::int64_t>(sum_of(evaluation.sums.tokens))},
                           {"sequences", evaluation.sums.tokens.size()},
                           {"source", evaluation.source},
                           {"model_bytes", evaluation.model_bytes},
                           {"bits_per_weight", evaluation.bits_per_weight}};
    if (evaluation.has_reference()) {
        const Estimate divergence = divergence_of(evaluation.sums);
        const Estimate agreement = agreement_of(evaluation.sums);
        const Estimate perplexity_there = reference_perplexity_of(evaluation.sums);
        result["reference"] = {{"model", evaluation.reference},
                               {"perplexity", perplexity_there.value},
                               {"perplexity_interval", interval_json(perplexity_there)},
                               {"kl_divergence", divergence.value},
                               {"kl_divergence_interval", interval_json(divergence)},
                               {"top1_agreement", agreement.value},
                               {"top1_agreement_interval", interval_json(agreement)},
                               {"hidden_error", evaluation.hidden_errors}};
        if (evaluation.predicted_ratio) {
            result["reference"]["predicted_perplexity"] =
                *evaluation.predicted_ratio * perplexity_there.value;
        }
    }
    result["bootstrap"] = {{"seed", kBootstrapSeed}, {"resamples", kBootstrapResamples}};
    result["per_sequence"] = sequences_json(evaluation);
    result["seconds"] = evaluation.seconds;
    result["version"] = evaluation.version;
    result["backend"] = evaluation.backend;
    return result;
}

std::string json_text(const ordered_json& json) {
    return json.dump(2, ' ', false, ordered_json::error_handler_t::replace) + '\n';
}

Evaluation evaluation_from(const json& json, const std::string& file) {
    Evaluation result;
    try {
        json.at("model").get_to(result.model);
        json.at("architecture").get_to(result.architecture);
        json.at("source").get_to(result.source);
        json.at("version").get_to(result.version);
        json.at("backend").get_to(result.backend);
        json.at("model_bytes").get_to(result.model_bytes);
        json.at("bits_per_weight").get_to(result.bits_per_weight);
        json.at("seconds").get_to(result.seconds);
        const auto& sequences = json.at("per_sequence");
        sequences.at("fingerprint").get_to(result.sums.fingerprints);
        sequences.at("tokens").get_to(result.sums.tokens);
        sequences.at("negative_log_likelihood").get_to(result.sums.negative_log);
        if (json.contains("reference")) {
            json.at("reference").at("model").get_to(result.reference);
            json.at("reference").at("hidden_error").get_to(result.hidden_errors);
            sequences.at("reference_negative_log_likelihood").get_to(result.sums.reference_negative_log);
            sequences.at("kl_divergence").get_to(result.sums.divergence);
            sequences.at("top1_agreement").get_to(result.sums.same_top);
        }
    } catch (const nlohmann::json::exception& error) {
        throw BadInput("{} is no result of `quantmill eval --json`: {}", file, error.what());
    }
    const std::size_t count = result.sums.tokens.size();
    const bool whole = count > 0 && result.sums.fingerprints.size() == count &&
                       result.sums.negative_log.size() == count && sum_of(result.sums.tokens) > 0.0 &&
                       (!result.has_reference() ||
                        (result.sums.reference_negative_log.size() == count &&
                         result.sums.divergence.size() == count && result.sums.same_top.size() == count));
    if (!whole) throw BadInput("{}: the lists of per_sequence differ in length or are empty", file);
    return result;
}

std::string evaluation_text(const Evaluation& evaluation) {
    const Estimate perplexity = perplexity_of(evaluation.sums);
    std::string text = fmt::format("{}  perplexity {}  ({} sequences, {} tokens, {:.2f} bits a weight, {})\n",
                                   evaluation.architecture, text_of(perplexity, 4),
                                   evaluation.sums.tokens.size(), sum_of(evaluation.sums.tokens),
                                   evaluation.bits_per_weight, seconds_text(evaluation.seconds));
    if (!evaluation.has_reference()) return text;
    const Estimate reference = reference_perplexity_of(evaluation.sums);
    text +=
        fmt::format("against {}: perplexity {} there, KL divergence {} nats, top-1 agreement {}\n",
                    evaluation.reference, text_of(reference, 4), text_of(divergence_of(evaluation.sums), 5),
                    share_text(agreement_of(evaluation.sums)));
    if (evaluation.predicted_ratio) {
        text += fmt::format("target_bits: perplexity {:.2f} was predicted, {:.2f} is achieved\n",
                            *evaluation.predicted_ratio * reference.value, perplexity.value);
    }
    return text + "\n" + hidden_error_table({&evaluation}, {"block", "relative error of hidden states"});
}

std::string comparison_text(const Evaluation& a, const Evaluation& b) {
    require_same_sequences(a, b);
    const Estimate difference = perplexity_difference(a.sums, b.sums);
    std::vector<std::vector<std::string>> rows{{"", "A", "B", "B - A"},
                                               {"model", a.model, b.model, ""},
                                               {"perplexity", text_of(perplexity_of(a.sums), 4),
                                                text_of(perplexity_of(b.sums), 4), text_of(difference, 4)}};
    if (same_reference(a, b)) {
        const Estimate of_a = divergence_of(a.sums);
        const Estimate of_b = divergence_of(b.sums);
        rows.push_back({"KL divergence", text_of(of_a, 5), text_of(of_b, 5),
                        fmt::format("{:.5f}", of_b.value - of_a.value)});
        rows.push_back(
            {"top-1 agreement", share_text(agreement_of(a.sums)), share_text(agreement_of(b.sums)),
             fmt::format("{:.2f} %", 100.0 * (agreement_of(b.sums).value - agreement_of(a.sums).value))});
    }
    rows.push_back({"bits per weight", fmt::format("{:.3f}", a.bits_per_weight),
                    fmt::format("{:.3f}", b.bits_per_weight),
                    fmt::format("{:.3f}", b.bits_per_weight - a.bits_per_weight)});
    rows.push_back({"size", bytes_text(a.model_bytes), bytes_text(b.model_bytes), ""});
    std::string text = table_text(rows, "lrrr");
    if (same_reference(a, b)) {
        text += "\n" + hidden_error_table({&a, &b}, {"block", "error of hidden states, A", "B"});
    }
    return text;
}

ordered_json comparison_json(const Evaluation& a, const Evaluation& b) {
    require_same_sequences(a, b);
    const Estimate difference = perplexity_difference(a.sums, b.sums);
    return {{"a", to_json(a)},
            {"b", to_json(b)},
            {"perplexity_difference", difference.value},
            {"perplexity_difference_interval", interval_json(difference)}};
}

}  // namespace quantmill
