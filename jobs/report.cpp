#include "jobs/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "jobs/text.h"

namespace quantmill {

namespace {

using nlohmann::ordered_json;

// The columns of quantize_log.csv and the fields of a linear in report.json, in this order.
ordered_json fields(const LinearReport& linear) {
    return {{"module", linear.module},
            {"block", linear.block},
            {"group", linear.group},
            {"rows", linear.rows},
            {"columns", linear.columns},
            {"bits", linear.bits},
            {"group_size", linear.group_size},
            {"loss", linear.loss},
            {"mean_squared_error", linear.mean_squared_error},
            {"tokens", linear.tokens},
            {"damp_percent", linear.damp_percent},
            {"dead_columns", linear.dead_columns},
            {"fallback", linear.fallback},
            {"error_propagation_alpha", linear.error_propagation_alpha},
            {"forward_seconds", linear.forward_seconds},
            {"hessian_seconds", linear.hessian_seconds},
            {"factor_seconds", linear.factor_seconds},
            {"solve_seconds", linear.solve_seconds},
            {"io_seconds", linear.io_seconds}};
}

// RFC 4180: quoted where a comma, a quote or a line break would be misread.
std::string csv_cell(const ordered_json& value) {
    if (value.is_number_float()) return fmt::format("{}", value.get<double>());
    if (!value.is_string()) return value.dump();
    const auto& text = value.get_ref<const std::string&>();
    if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
    std::string quoted = "\"";
    for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
    return quoted + '"';
}

using GroupKey = std::pair<int, std::string>;

GroupKey group_of(const LinearReport& linear) {
    return {linear.block, linear.group.empty() ? linear.module : linear.group};
}

// One linear of each group, for what all linears of a group repeat.
std::vector<const LinearReport*> one_a_group(const std::vector<LinearReport>& linears) {
    std::set<GroupKey> seen;
    std::vector<const LinearReport*> result;
    for (const auto& linear : linears)
        if (seen.insert(group_of(linear)).second) result.push_back(&linear);
    return result;
}

struct StageSeconds {
    double forward = 0.0, hessian = 0.0, factor = 0.0, solve = 0.0, io = 0.0;
};

StageSeconds stage_seconds(const std::vector<LinearReport>& linears) {
    StageSeconds sum;
    for (const auto* linear : one_a_group(linears)) {
        sum.forward += linear->forward_seconds;
        sum.hessian += linear->hessian_seconds;
        sum.factor += linear->factor_seconds;
        sum.solve += linear->solve_seconds;
        sum.io += linear->io_seconds;
    }
    return sum;
}

double seconds_of(const LinearReport& linear) {
    return linear.forward_seconds + linear.hessian_seconds + linear.factor_seconds + linear.solve_seconds +
           linear.io_seconds;
}

// All linears of one name, "q_proj", over the blocks.
struct KindTotals {
    std::string kind;
    std::int64_t count = 0;
    double loss = 0.0, squared_error = 0.0, weights = 0.0;
    double seconds = 0.0;  // an equal share of each group's
    std::set<int> bits;
};

std::vector<KindTotals> totals_by_kind(const std::vector<LinearReport>& linears) {
    std::map<GroupKey, int> members;
    for (const auto& linear : linears) ++members[group_of(linear)];
    std::vector<KindTotals> totals;
    for (const auto& linear : linears) {
        const auto kind = linear.module.substr(linear.module.rfind('.') + 1);
        auto total = std::ranges::find(totals, kind, &KindTotals::kind);
        if (total == totals.end()) {
            total = totals.insert(totals.end(), KindTotals{});
            total->kind = kind;
        }
        const double weights = static_cast<double>(linear.rows) * static_cast<double>(linear.columns);
        ++total->count;
        total->loss += linear.loss;
        total->squared_error += linear.mean_squared_error * weights;
        total->weights += weights;
        total->seconds += seconds_of(linear) / members[group_of(linear)];
        total->bits.insert(linear.bits);
    }
    return totals;
}

std::string kind_table(const std::vector<LinearReport>& linears) {
    std::vector<std::vector<std::string>> rows = {
        {"linear", "count", "bits", "mean loss", "mean squared error", "time"}};
    for (const auto& total : totals_by_kind(linears))
        rows.push_back({total.kind, std::to_string(total.count),
                        fmt::format("{}", fmt::join(total.bits, ",")),
                        fmt::format("{:.4g}", total.loss / static_cast<double>(total.count)),
                        fmt::format("{:.3e}", total.squared_error / std::max(total.weights, 1.0)),
                        seconds_text(total.seconds)});
    return table_text(rows, "lrrrrr");
}

// The linears that fell back, the first few by name.
std::string names_with(const std::vector<LinearReport>& linears, const std::string& fallback) {
    constexpr std::size_t shown = 4;
    std::vector<std::string> names;
    for (const auto& linear : linears)
        if (linear.fallback == fallback) names.push_back(linear.module);
    const auto count = names.size();
    if (count > shown) {
        names.resize(shown);
        names.push_back(fmt::format("and {} more", count - shown));
    }
    return list_text(names);
}

ordered_json layers_json(const LayersReport& layers) {
    return {{"propagate", layers.propagate},
            {"groups", layers.groups},
            {"sweeps", layers.sweeps},
            {"bubble", layers.bubble},
            {"load_seconds", layers.load_seconds},
            {"stream_seconds", layers.stream_seconds},
            {"solve_seconds", layers.solve_seconds},
            {"write_seconds", layers.write_seconds},
            {"waited_seconds", layers.waited_seconds},
            {"run_seconds", layers.run_seconds},
            {"bytes_between_ranks",
             {{"broadcast", layers.broadcast_bytes},
              {"sum", layers.sum_bytes},
              {"gather", layers.gather_bytes},
              {"stream", layers.stream_bytes},
              {"delivery", layers.delivery_bytes}}}};
}

// Nothing of a single rank.
std::string layers_line(const Report& report) {
    const LayersReport& layers = report.layers;
    if (report.world_size == 1) return "";
    std::string text = fmt::format("{} rank{} in {} group{}, propagate: {}", report.world_size,
                                   report.world_size == 1 ? "" : "s", layers.groups,
                                   layers.groups == 1 ? "" : "s", layers.propagate);
    if (layers.propagate == "original") {
        text += fmt::format("; stream {} ({} sweep{}, bubble {:.1f}%, waited {}), solving {}",
                            seconds_text(layers.stream_seconds), layers.sweeps, layers.sweeps == 1 ? "" : "s",
                            100.0 * layers.bubble, seconds_text(layers.waited_seconds),
                            seconds_text(layers.solve_seconds));
    }
    const std::uint64_t bytes = layers.broadcast_bytes + layers.sum_bytes + layers.gather_bytes +
                                layers.stream_bytes + layers.delivery_bytes;
    return fmt::format("{}; {} between ranks\n", text, bytes_text(bytes));
}

ordered_json by_bits(const std::map<int, double>& losses) {
    ordered_json json = ordered_json::object();
    for (const auto& [bits, loss] : losses) json[std::to_string(bits)] = loss;
    return json;
}

ordered_json budget_json(const BitBudgetReport& budget) {
    ordered_json groups = ordered_json::array();
    for (const BitChoice& choice : budget.groups) {
        groups.push_back({{"block", choice.block},
                          {"group", choice.group},
                          {"bits", choice.bits},
                          {"losses", by_bits(choice.losses)}});
    }
    return {{"target", budget.target},
            {"achieved", budget.achieved},
            {"predicted_loss", budget.predicted_loss},
            {"predicted_perplexity_ratio", budget.predicted_ratio},
            {"uniform_loss", by_bits(budget.uniform_loss)},
            {"seconds", budget.seconds},
            {"groups", groups}};
}

std::string budget_line(const BitBudgetReport& budget) {
    std::map<int, int> counts;
    for (const BitChoice& choice : budget.groups) ++counts[choice.bits];
    std::vector<std::string> parts;
    for (const auto& [bits, count] : counts) parts.push_back(fmt::format("{} of {} bits", count, bits));
    std::vector<std::string> uniform;
    for (const auto& [bits, loss] : budget.uniform_loss)
        uniform.push_back(fmt::format("{:.3g} with {} bits", loss, bits));
    return fmt::format(
        "target_bits {:g}: groups {}, {:.3f} bits a weight; predicted loss {:.3g} (everywhere alike: {}), "
        "perplexity {:.3g} times the original's; chosen in {}\n",
        budget.target, fmt::join(parts, ", "), budget.achieved, budget.predicted_loss,
        fmt::join(uniform, ", "), budget.predicted_ratio, seconds_text(budget.seconds));
}

std::string fallback_lines(const Report& report) {
    const auto totals = count_fallbacks(report);
    std::string text;
    if (totals.damping_raised > 0)
        text += fmt::format("damping raised, up to {:.3g}, in {} linears: {}\n", totals.largest_damp_percent,
                            totals.damping_raised, names_with(report.linears, fallback_damping));
    if (totals.rounded_to_nearest > 0)
        text += fmt::format("rounded to nearest, without GPTQ, {} linears: {}\n", totals.rounded_to_nearest,
                            names_with(report.linears, fallback_rounding));
    if (totals.few_tokens > 0)
        text += fmt::format(
            "too few tokens for their width, so that only the diagonal of the Hessian counted, {} linears: "
            "{}\n",
            totals.few_tokens, names_with(report.linears, fallback_few_tokens));
    if (totals.dead_columns > 0)
        text += fmt::format("{} input columns were zero in all calibration tokens; their weights are 0\n",
                            totals.dead_columns);
    return text.empty() ? "no fallbacks\n" : text;
}

}  // namespace

FallbackTotals count_fallbacks(const Report& report) {
    FallbackTotals totals;
    for (const auto& linear : report.linears) {
        totals.damping_raised += linear.fallback == fallback_damping;
        totals.rounded_to_nearest += linear.fallback == fallback_rounding;
        totals.few_tokens += linear.fallback == fallback_few_tokens;
        totals.largest_damp_percent = std::max(totals.largest_damp_percent, linear.damp_percent);
    }
    for (const auto* linear : one_a_group(report.linears)) totals.dead_columns += linear->dead_columns;
    return totals;
}

double bits_per_weight(const std::vector<LinearReport>& linears) {
    double bits = 0.0, weights = 0.0;
    for (const auto& linear : linears) {
        const auto rows = static_cast<double>(linear.rows), columns = static_cast<double>(linear.columns);
        const std::int64_t group_size = linear.group_size > 0 ? linear.group_size : linear.columns;
        const std::int64_t groups = (linear.columns + group_size - 1) / group_size;
        weights += rows * columns;
        // Codes; a 16-bit scale and a zero point a group; an int32 of g_idx a column.
        bits += rows * columns * linear.bits + static_cast<double>(groups) * rows * (16 + linear.bits) +
                columns * 32;
    }
    return weights > 0.0 ? bits / weights : 0.0;
}

std::string to_csv(const Report& report) {
    const auto line = [](const std::vector<std::string>& cells) {
        return fmt::format("{}\n", fmt::join(cells, ","));
    };
    std::vector<std::string> names;
    const ordered_json columns = fields({});
    for (const auto& column : columns.items()) names.push_back(column.key());
    auto text = line(names);
    for (const auto& linear : report.linears) {
        std::vector<std::string> cells;
        for (const auto& value : fields(linear)) cells.push_back(csv_cell(value));
        text += line(cells);
    }
    return text;
}

std::string to_json(const Report& report) {
    const auto stages = stage_seconds(report.linears);
    const auto fallbacks = count_fallbacks(report);
    ordered_json json = {{"version", report.version},
                         {"backend", report.backend},
                         {"communicator", report.communicator},
                         {"libraries", report.libraries},
                         {"devices", report.devices},
                         {"world_size", report.world_size},
                         {"threads", report.threads},
                         {"model", report.model},
                         {"family", report.family},
                         {"parameters", report.parameters},
                         {"sequences", report.sequences},
                         {"tokens", report.tokens},
                         {"source_bytes", report.source_bytes},
                         {"output_bytes", report.output_bytes},
                         {"bits_per_weight", bits_per_weight(report.linears)},
                         {"seconds", report.seconds},
                         {"block_seconds", report.block_seconds},
                         {"peak_memory", report.peak_memory},
                         {"stage_seconds",
                          {{"forward", stages.forward},
                           {"hessian", stages.hessian},
                           {"factor", stages.factor},
                           {"solve", stages.solve},
                           {"io", stages.io}}},
                         {"planned_seconds",
                          {{"forward", report.planned.forward},
                           {"hessian", report.planned.hessian},
                           {"factor", report.planned.factor},
                           {"solve", report.planned.solve},
                           {"io", report.planned.io}}},
                         {"fallbacks",
                          {{"damping_raised", fallbacks.damping_raised},
                           {"rounded_to_nearest", fallbacks.rounded_to_nearest},
                           {"few_tokens", fallbacks.few_tokens},
                           {"largest_damp_percent", fallbacks.largest_damp_percent},
                           {"dead_columns", fallbacks.dead_columns}}},
                         {"layers", layers_json(report.layers)},
                         {"warnings", report.warnings},
                         {"job", report.job_yaml},
                         {"calibration_sequences", report.calibration_sequences}};
    if (report.bit_budget) json["bit_budget"] = budget_json(*report.bit_budget);
    json["linears"] = ordered_json::array();
    for (const auto& linear : report.linears) json["linears"].push_back(fields(linear));
    // A path may hold bytes that are not UTF-8; the report of a finished job must not fail over it.
    return json.dump(2, ' ', false, ordered_json::error_handler_t::replace) + '\n';
}

std::string summary_table(const Report& report) {
    const auto stages = stage_seconds(report.linears);
    const auto share = [&](std::uint64_t bytes, std::uint64_t of) {
        return 100.0 * static_cast<double>(bytes) / static_cast<double>(std::max<std::uint64_t>(of, 1));
    };
    auto text = kind_table(report.linears) + '\n';
    text +=
        fmt::format("forward {}, Hessians {}, factors {}, solving {}, reading and writing {}; {} in all\n",
                    seconds_text(stages.forward), seconds_text(stages.hessian), seconds_text(stages.factor),
                    seconds_text(stages.solve), seconds_text(stages.io), seconds_text(report.seconds));
    text += layers_line(report);
    if (report.bit_budget) text += budget_line(*report.bit_budget);
    text += fallback_lines(report);
    text += fmt::format("size {} of {} ({:.1f}%), {:.2f} bits a quantized weight\n",
                        bytes_text(report.output_bytes), bytes_text(report.source_bytes),
                        share(report.output_bytes, report.source_bytes), bits_per_weight(report.linears));
    for (const auto& warning : report.warnings) text += "warning: " + warning + '\n';
    return text;
}

}  // namespace quantmill
