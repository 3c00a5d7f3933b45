#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "kernels/error.h"

namespace quantmill {

// The command line as data; main() acts on it.

struct RunCommand {
    std::filesystem::path job;
    std::vector<std::string> overrides;  // "quantization.bits=3", for load_job_spec
    bool overwrite = false;
};

struct PlanCommand {
    std::filesystem::path job;
    std::vector<std::string> overrides;
    bool measure = true;
    bool overwrite = false;
    std::optional<int> world_size;     // plan for that many ranks instead of those that are there
    std::optional<int> gpus_per_node;  // ranks on each of their nodes
};

struct EvalCommand {
    std::filesystem::path model;
    std::filesystem::path tokens, text;  // one of them
    std::optional<std::filesystem::path> reference;
    std::optional<std::int64_t> sequence_length;
    std::optional<std::int64_t> sequences;
    std::optional<std::filesystem::path> json;
    std::optional<std::filesystem::path> logits;
    std::string backend = "auto";
    bool allow_tokenizer_mismatch = false;
    bool allow_calibration_tokens = false;
};

struct CompareCommand {
    std::filesystem::path a, b;  // results of eval --json, or checkpoint directories
    EvalCommand eval;            // how directories are evaluated; without a model
};

struct InspectCommand {
    std::filesystem::path directory;
};

// Nothing to do but to print `text` (to stdout when `code` is ok, else to stderr) and exit with `code`.
struct PrintCommand {
    ExitCode code = ExitCode::ok;
    std::string text;
};

struct CommandLine {
    std::variant<RunCommand, PlanCommand, EvalCommand, CompareCommand, InspectCommand, PrintCommand> command;
    std::string log_level = "info";  // trace | debug | info | warn | error
};

// Never throws: help, --version and mistakes come back as a PrintCommand (exit codes 0 and 2). `version`
// is what --version prints. The log level is --log-level, else the environment's QUANTMILL_LOG, else info.
CommandLine parse_command_line(int argc, const char* const* argv, const std::string& version);

}  // namespace quantmill
