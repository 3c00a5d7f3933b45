#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quantmill {

// What became of one linear. Seconds are of its LinearGroup on the slowest rank.
struct LinearReport {
    std::string module;  // "model.layers.0.self_attn.q_proj"
    int block = 0;
    std::int64_t rows = 0, columns = 0;
    int bits = 0;
    std::int64_t group_size = 0;
    double loss = 0.0;                  // tr((W−Q) H (W−Q)ᵀ)
    double mean_squared_error = 0.0;    // of the weights
    std::int64_t tokens = 0;            // seen by its Hessian
    double damp_percent = 0.0;          // used in the end
    std::int64_t dead_columns = 0;
    std::string fallback;               // empty, "damping raised" or "round to nearest"
    double forward_seconds = 0.0, hessian_seconds = 0.0, factor_seconds = 0.0, solve_seconds = 0.0,
           io_seconds = 0.0;
};

// Everything that a finished job tells; report.json holds all of it.
struct Report {
    std::string version, backend, communicator, model, family, job_yaml;
    int world_size = 1;
    int threads = 1;
    std::int64_t sequences = 0, tokens = 0;
    std::uint64_t source_bytes = 0, output_bytes = 0;
    double seconds = 0.0;
    std::vector<LinearReport> linears;
};

std::string to_csv(const Report& report);      // quantize_log.csv
std::string to_json(const Report& report);     // report.json
std::string summary_table(const Report& report);  // what the terminal shows at the end

}  // namespace quantmill
