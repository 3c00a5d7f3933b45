#include "workers/job_report.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "pipeline/fingerprint.h"
#include "pipeline/model_card.h"
#include "workers/calibration_batches.h"
#include "workers/version.h"

namespace quantmill {
namespace {

std::string fallback_of(const FactorOutcome& outcome) {
    if (outcome.few_tokens) return fallback_few_tokens;
    if (outcome.round_to_nearest) return fallback_rounding;
    return outcome.damping_raised ? fallback_damping : "";
}

}  // namespace

std::vector<LinearReport> report_group(const PreparedJob& job, int block, std::size_t stage,
                                       const QuantizedGroup& result, double io_seconds) {
    const LinearGroup& group = job.graph.stages_of(block)[stage].group;
    std::vector<LinearReport> linears;
    for (std::size_t l = 0; l < group.linears.size(); ++l) {
        const Linear& linear = group.linears[l];
        LinearReport entry;
        entry.module = job.graph.in_block(block, linear.name);
        entry.block = block;
        entry.group = group.name;
        entry.rows = linear.rows;
        entry.columns = linear.columns;
        entry.bits = result.quantized.grid.bits;
        entry.group_size = result.quantized.grid.group_size;
        entry.loss = result.loss[l];
        entry.mean_squared_error =
            result.squared_error[l] / static_cast<double>(linear.rows * linear.columns);
        entry.tokens = tokens_of_shards(job.shards);
        entry.damp_percent = result.outcome.damp_percent;
        entry.dead_columns = static_cast<std::int64_t>(result.outcome.dead_columns.size());
        entry.fallback = fallback_of(result.outcome);
        entry.error_propagation_alpha = result.error_propagation_alpha;
        entry.forward_seconds = result.seconds.forward;
        entry.hessian_seconds = result.seconds.hessian;
        entry.factor_seconds = result.seconds.factor;
        entry.solve_seconds = result.seconds.solve;
        entry.io_seconds = io_seconds;
        linears.push_back(entry);
    }
    if (!result.outcome.dead_columns.empty() || !fallback_of(result.outcome).empty()) {
        spdlog::info("block {} {}: damping {:.3f}, {} dead columns {}", block, group.name,
                     result.outcome.damp_percent, result.outcome.dead_columns.size(),
                     fallback_of(result.outcome));
    }
    const std::string fallback = fallback_of(result.outcome);
    if (!fallback.empty() && job.spec.quantization.on_fallback == "error") {
        throw BadInput(
            "{}: {} where GPTQ was asked for (damping {:.3f}, {} tokens for a width of {}), and "
            "quantization.on_fallback is error: give more calibration tokens, or raise "
            "quantization.damp_percent",
            linears.front().module, fallback, result.outcome.damp_percent, linears.front().tokens,
            group.columns());
    }
    return linears;
}

Report begin_report(const PreparedJob& job, Control& control, const Backend& backend,
                    const std::string& communicator) {
    Report report;
    report.version = short_version();
    report.backend = backend.name();
    report.communicator = communicator;
    report.model = base_model_name(job.spec.model);
    report.family = job.graph.family;
    report.job_yaml = to_yaml(job.spec);
    report.libraries = library_versions();
    report.devices = control.all_gather(control.host() + ": " + backend.description());
    report.world_size = control.size();
    report.threads = backend.threads();
    report.sequences = static_cast<std::int64_t>(job.calibration.sequences.size());
    report.tokens = tokens_of_shards(job.shards);
    report.calibration_sequences = fingerprints_of_sequences(job.calibration.sequences);
    for (const auto& [name, tensor] : job.reader.tensors()) report.parameters += tensor.count();
    report.source_bytes = job.reader.total_bytes();
    report.output_bytes = job.layout.total_bytes();
    return report;
}

std::vector<LinearReport> gather_linears(const PreparedJob& job, Control& control,
                                         const std::vector<LinearReport>& own) {
    nlohmann::json mine = nlohmann::json::array();
    for (const LinearReport& l : own) {
        mine.push_back({l.module,
                        l.block,
                        l.group,
                        l.rows,
                        l.columns,
                        l.bits,
                        l.group_size,
                        l.loss,
                        l.block_error,
                        l.mean_squared_error,
                        l.tokens,
                        l.damp_percent,
                        l.dead_columns,
                        l.fallback,
                        l.error_propagation_alpha,
                        l.forward_seconds,
                        l.hessian_seconds,
                        l.factor_seconds,
                        l.solve_seconds,
                        l.io_seconds});
    }
    std::map<std::string, LinearReport> found;
    for (const std::string& message : control.all_gather(mine.dump())) {
        for (const auto& f : nlohmann::json::parse(message)) {
            found.emplace(f.at(0),
                          LinearReport{f.at(0),  f.at(1),  f.at(2),  f.at(3),  f.at(4),  f.at(5),  f.at(6),
                                       f.at(7),  f.at(8),  f.at(9),  f.at(10), f.at(11), f.at(12), f.at(13),
                                       f.at(14), f.at(15), f.at(16), f.at(17), f.at(18), f.at(19)});
        }
    }
    std::vector<LinearReport> ordered;
    for_each_quantized(job.graph, job.scheme,
                       [&](int block, std::size_t, const LinearGroup& group, const GptqOptions&) {
                           for (const Linear& linear : group.linears) {
                               ordered.push_back(found.at(job.graph.in_block(block, linear.name)));
                           }
                       });
    return ordered;
}

}  // namespace quantmill
