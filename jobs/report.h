#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace quantmill {

// What LinearReport::fallback says when plain GPTQ did not do.
inline constexpr const char* fallback_damping = "damping raised";
inline constexpr const char* fallback_rounding = "round to nearest";
inline constexpr const char* fallback_few_tokens = "diagonal Hessian";

// What became of one linear. Seconds are of its LinearGroup on the slowest rank, so linears of one block
// and group show the same numbers; sums must count a group once.
struct LinearReport {
    std::string module;  // "model.layers.0.self_attn.q_proj"
    int block = 0;
    std::string group;  // its LinearGroup, "qkv"; empty: a group of its own
    std::int64_t rows = 0, columns = 0;
    int bits = 0;
    std::int64_t group_size = 0;
    double loss = 0.0;                // tr((W−Q) H (W−Q)ᵀ)
    double block_error = 0.0;         // of BlockProbe, where bits were chosen by it, else 0; not shown
    double mean_squared_error = 0.0;  // of the weights
    std::int64_t tokens = 0;          // seen by its Hessian
    double damp_percent = 0.0;        // used in the end
    std::int64_t dead_columns = 0;
    std::string fallback;                  // empty, or one of the above
    double error_propagation_alpha = 0.0;  // 0: none, also where it was rounded to nearest
    double forward_seconds = 0.0, hessian_seconds = 0.0, factor_seconds = 0.0, solve_seconds = 0.0,
           io_seconds = 0.0;
};

// How the ranks shared the work, and what went between them.
struct LayersReport {
    std::string propagate = "quantized";  // or "original"
    std::int64_t groups = 1, sweeps = 1;
    double bubble = 0.0;  // share of the stream in which groups must idle, by the plan
    // Of the slowest rank; with "original" only. `write_seconds`: between the last solve and the last tensor
    // written. `run_seconds`: from the first weights read to the last tensor written.
    double load_seconds = 0.0, stream_seconds = 0.0, solve_seconds = 0.0, write_seconds = 0.0,
           waited_seconds = 0.0, run_seconds = 0.0;
    // Bytes that came to ranks from others, over all ranks: weights and factors, Hessians, quantized rows,
    // hidden states, finished tensors.
    std::uint64_t broadcast_bytes = 0, sum_bytes = 0, gather_bytes = 0, stream_bytes = 0, delivery_bytes = 0;
};

// What the plan expected the stages of all blocks to take, in seconds.
struct PlannedSeconds {
    double forward = 0.0, hessian = 0.0, factor = 0.0, solve = 0.0, io = 0.0;
};

// How quantization.target_bits was spent: what a group of linears loses at each number of bits.
struct BitChoice {
    int block = 0;
    std::string group;
    int bits = 0;                  // chosen
    std::map<int, double> losses;  // bits → relative error of its block's outputs
};
struct BitBudgetReport {
    double target = 0.0, achieved = 0.0;  // bits a weight
    double predicted_loss = 0.0;          // sum of what the chosen bits lose
    double predicted_ratio = 1.0;         // perplexity over the original model's
    std::map<int, double> uniform_loss;   // bits → predicted_loss when all have them
    std::vector<BitChoice> groups;
    double seconds = 0.0;
};

// Everything that a finished job tells; report.json holds all of it.
struct Report {
    std::string version, backend, communicator, model, family, job_yaml;
    std::map<std::string, std::string> libraries;  // name → version: the same bytes come from the same ones
    std::vector<std::string> devices;              // a rank each: "gpu01: NVIDIA H200"
    int world_size = 1;
    int threads = 1;
    std::int64_t sequences = 0, tokens = 0;
    std::vector<std::string> calibration_sequences;    // a fingerprint each, so that eval knows them again
    std::int64_t parameters = 0;                       // of the whole model
    std::uint64_t source_bytes = 0, output_bytes = 0;  // of all tensors
    double seconds = 0.0;
    std::vector<double> block_seconds;  // of each block, as rank 0 saw it
    std::uint64_t peak_memory = 0;      // of the rank that took most: of its GPU, on the CPU of the process
    PlannedSeconds planned;
    LayersReport layers;
    std::vector<LinearReport> linears;
    std::optional<BitBudgetReport> bit_budget;
    std::vector<std::string> warnings;
};

// What went otherwise than planned, over all linears.
struct FallbackTotals {
    std::int64_t damping_raised = 0, rounded_to_nearest = 0, few_tokens = 0;  // linears
    double largest_damp_percent = 0.0;
    std::int64_t dead_columns = 0;  // of all groups
};
FallbackTotals count_fallbacks(const Report& report);

// Bits that qweight, scales, qzeros and g_idx take for each weight of the quantized linears.
double bits_per_weight(const std::vector<LinearReport>& linears);

std::string to_csv(const Report& report);         // quantize_log.csv: a header, then a line a linear
std::string to_json(const Report& report);        // report.json
std::string summary_table(const Report& report);  // what the terminal shows at the end

}  // namespace quantmill
