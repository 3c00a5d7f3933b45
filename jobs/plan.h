#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace quantmill {

// What a job would do, found without reading a weight: plain data that workers/ fills. Bytes are exact
// where the file formats decide them, else upper bounds; seconds are estimates.

struct PlannedModel {
    std::string name;          // last component of the directory
    std::string family;        // "llama"
    std::string architecture;  // "LlamaForCausalLM"
    std::string dtype;         // "bf16"
    std::int64_t blocks = 0;
    std::int64_t parameters = 0;
    std::uint64_t bytes = 0;
    std::int64_t files = 0;
};

// Linears of a block that share one input, so one Hessian [columns, columns].
struct PlannedGroup {
    std::string name;                  // "qkv"
    std::vector<std::string> linears;  // "q_proj", "k_proj", "v_proj"
    std::int64_t rows = 0;             // of all its linears
    std::int64_t columns = 0;
};

struct PlannedQuantization {
    std::string scheme;                   // "4 bits, group_size 128, symmetric"
    std::int64_t linears = 0;             // of the whole model
    std::int64_t parameters = 0;          // in them
    std::vector<PlannedGroup> groups;     // of one block
    std::vector<std::string> left_alone;  // "lm_head", "model.embed_tokens", "norms"
};

struct PlannedCalibration {
    std::string tokens;  // the store's file
    std::int64_t sequences = 0;
    std::int64_t token_count = 0;
    std::int64_t longest = 0;  // tokens of the longest sequence
    std::int64_t shards = 0;
    std::int64_t micro_batches = 0;
    std::string hessians;  // where they are kept or come from; nothing when they are of this run alone
};

struct NamedBytes {
    std::string name;  // "weights of a block"
    std::uint64_t bytes = 0;
};

struct PlannedRank {
    int rank = 0;
    std::string host;
    std::int64_t sequences = 0;
    std::vector<std::int64_t> shards;        // calibration shards it owns
    std::vector<std::int64_t> rows;          // it solves, one number a PlannedGroup
    std::vector<std::int64_t> output_files;  // indices into Plan::files
    std::vector<NamedBytes> memory;
    std::uint64_t free_memory =
        0;  // of its device, less the gaps of a pool; on the CPU its share of the host's
    std::int64_t tokens = 0;
    std::int64_t device_tokens = 0;  // whose activations stay on the device; those of the others are streamed
    bool recomputes = false;         // inputs carried between stages, instead of keeping them
    // What a rank with a device takes of its host: streamed activations, read-ahead, output on its way.
    std::uint64_t host_memory = 0, free_host_memory = 0;
};

// Ranks that hold the same blocks, or with propagate: quantized solve the same rows. Times are seconds from
// the start of the job, and what the group spends in all.
struct PlannedLayerGroup {
    std::vector<std::int64_t> ranks;
    std::vector<std::string> blocks;                                   // a sweep: "0-14"
    double begins = 0.0, streamed = 0.0, solved = 0.0, written = 0.0;  // in the last sweep
    double stream_seconds = 0.0, reduce_seconds = 0.0, solve_seconds = 0.0, idle_seconds = 0.0;
};

// How the ranks divide the work, and what that gains.
struct PlannedLayers {
    std::string propagate;  // "quantized" | "original"
    std::vector<PlannedLayerGroup> groups;
    std::int64_t sweeps = 1;     // 0: Hessians come from a store, and nothing streams
    double bubble = 0.0;         // share of the stream's time in which groups idle
    double seconds = 0.0;        // predicted, of all ranks
    double alone_seconds = 0.0;  // of one rank
    std::string bound;           // what keeps the speed-up below the number of ranks
};

struct PlannedFile {
    std::string name;  // model-00001-of-00008.safetensors
    std::uint64_t bytes = 0;
    int owner = 0;  // rank
};

struct PlannedTime {
    double forward = 0.0, hessian = 0.0, factor = 0.0, solve = 0.0, io = 0.0;  // seconds
    double gflops = 0.0;     // a rank's rate, measured just now
    double measuring = 0.0;  // seconds before all that, for quantization.target_bits
    double total() const { return forward + hessian + factor + solve + io + measuring; }
};

struct Plan {
    std::string job;                    // the job file
    std::string backend, communicator;  // "cpu: AMD EPYC, 2 threads", "mpi"
    PlannedModel model;
    PlannedQuantization quantization;
    PlannedCalibration calibration;
    std::string output_directory, output_format;
    std::vector<std::string> more_outputs;  // of the same run, a line each
    std::vector<PlannedFile> files;
    std::uint64_t disk_needed = 0;     // of the files and what is copied beside them
    std::uint64_t disk_free = 0;       // with what is reclaimed
    std::uint64_t disk_reclaimed = 0;  // by removing what an earlier run left
    std::vector<PlannedRank> ranks;
    std::optional<PlannedTime> time;  // none with --no-measure
    PlannedLayers layers;
    std::vector<std::string> warnings;  // the job runs, but think
    std::vector<std::string> problems;  // the job is refused
};

std::uint64_t total_memory(const PlannedRank& rank);

// The dry run as text for a terminal; ranks that do alike share a line.
std::string to_text(const Plan& plan);

}  // namespace quantmill
