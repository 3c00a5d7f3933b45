#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace quantmill {

// What the user wants: plain data, one member a key of the YAML file (docs/job-spec.md). Paths are
// absolute: load_job_spec has resolved those relative to the job file's directory.
struct OutputSpec {
    std::filesystem::path directory;
    std::string format = "gptq";  // gptq | gptq_v2
    std::uint64_t max_shard_size = 5'000'000'000;
    std::int64_t tensor_parallel = 1;  // output.serve.tensor_parallel
    bool allow_unservable = false;
};

struct CalibrationSpec {
    std::filesystem::path tokens;
    std::optional<std::int64_t> sequences;
    std::optional<std::int64_t> sequence_length;
    bool allow_tokenizer_mismatch = false;
    std::filesystem::path save_hessians;  // empty: not saved
    std::filesystem::path hessians;       // empty: from the model
};

struct QuantizationRule;

struct QuantizationSpec {
    int bits = 4;
    std::int64_t group_size = 128;  // -1: one group a row
    bool sym = true;
    bool desc_act = false;
    std::optional<double> damp_percent = 0.05;  // none: auto
    double damp_auto_increment = 0.01;
    bool true_sequential = true;
    std::string propagate = "quantized";  // quantized | original
    std::string preset = "balanced";      // plain | gptqmodel | balanced | best: decides what follows
    bool act_group_aware = true;
    bool static_groups = false;
    std::string scale_search = "hessian";  // minmax | mse | hessian
    bool signed_scales = true;
    std::string scale_rounding = "auto";  // auto | fp16 | bf16
    bool refit = false;
    int sweeps = 0;
    double error_propagation_alpha = 0.0;    // 0: off
    std::string on_fallback = "report";      // report | error
    std::optional<double> target_bits;       // average a weight, all overhead counted; none: bits
    std::string target_choices = "2,3,4,8";  // 2,3,4,8 | 4,8: what target_bits chooses among
    std::optional<int> lm_head_bits;         // quantization.lm_head.bits; none: lm_head is left as it is
    std::optional<std::int64_t> lm_head_group_size;  // none: group_size
    std::vector<QuantizationRule> overrides;         // of the rules that match a linear, the first counts
};

// An item of quantization.overrides: what becomes of the linears of a LinearGroup whose names match.
struct QuantizationRule {
    std::string match;              // a ModulePattern
    bool skip = false;              // left as they are
    std::vector<std::string> keys;  // that it sets: "bits"
    QuantizationSpec quantization;  // the job's with these keys
    std::string place;              // "job.yaml:12"
};

struct ComputeSpec {
    std::string backend = "auto";                // auto | cpu | cuda
    std::string communicator = "auto";           // auto | nccl | mpi
    std::optional<std::uint64_t> device_memory;  // bytes of a GPU; absent: what is free
    std::string activations = "auto";            // auto | stream | recompute
    std::optional<std::int64_t> layer_groups;    // none: the plan chooses
    double stall_timeout = 600.0;                // seconds
};

// One of several checkpoints that a job writes: its place, and the job's quantization with its changes.
struct OutputVariant {
    OutputSpec output;
    QuantizationSpec quantization;
};

struct JobSpec {
    std::filesystem::path model;
    OutputSpec output;
    CalibrationSpec calibration;
    QuantizationSpec quantization;
    ComputeSpec compute;
    std::vector<OutputVariant> outputs;  // instead of `output`; empty: that one
};

// The jobs that would each write one of the checkpoints of `spec`, which they write byte for byte alike.
std::vector<JobSpec> single_jobs(const JobSpec& spec);

// Reads a YAML job file and applies overrides of the form "quantization.bits=3" in order. Throws BadInput
// with file:line, key, allowed values and the nearest known key for unknown or duplicate keys, wrong types
// and values out of range; it names our key for keys of GPTQModel and llm-compressor.
JobSpec load_job_spec(const std::filesystem::path& file, const std::vector<std::string>& overrides);

// The same for the text of a job file; `file` is what messages name and relative paths start from.
JobSpec parse_job_spec(const std::string& text, const std::filesystem::path& file,
                       const std::vector<std::string>& overrides);

// The whole spec as YAML that load_job_spec accepts: what a log or report shows of a job.
std::string to_yaml(const JobSpec& spec);

// One row a key: drives the parser, --help and the test that holds docs/job-spec.md against both.
struct JobKey {
    std::string path;           // "quantization.bits"
    std::string values;         // "2 | 3 | 4 | 8"
    std::string default_value;  // "4", or "required"
    std::string meaning;        // one line
};
const std::vector<JobKey>& job_keys();

}  // namespace quantmill
