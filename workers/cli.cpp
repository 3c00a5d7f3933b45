#include "workers/cli.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>

#include "jobs/job_spec.h"
#include "jobs/text.h"

namespace quantmill {

namespace {

const std::vector<std::string> commands = {"run", "plan", "eval", "compare", "inspect"};
const std::vector<std::string> log_levels = {"trace", "debug", "info", "warn", "error"};

constexpr const char* exit_codes =
    "Exit codes:\n"
    "  0   done\n"
    "  2   bad input: the job, a file or an option is wrong; trying again is useless\n"
    "  70  internal error: please report it\n"
    "  75  infrastructure fault (a rank, GPU, disk or network failed): trying again may help\n"
    "  85  reserved for runs that were stopped and can be resumed\n";

constexpr const char* main_help =
    "Examples:\n"
    "  quantmill plan job.yaml                            what would happen: memory, disk, time\n"
    "  quantmill run job.yaml                             quantize on this machine\n"
    "  mpirun -n 4 quantmill run job.yaml                 the same on four ranks, the same bytes\n"
    "  quantmill eval --model DIR --tokens heldout.h5     perplexity before or after\n"
    "  quantmill compare A.json B.json                    two evaluations side by side\n"
    "  quantmill inspect DIR                              list and verify a checkpoint\n"
    "  quantmill COMMAND --help                           everything about one command\n\n";

constexpr const char* run_help =
    "Reads the Hugging Face checkpoint that the job names, quantizes its linears with GPTQ block by block\n"
    "and writes a GPTQ checkpoint, a report.json and a quantize_log.csv into output.directory. Makes the\n"
    "checks of 'quantmill plan' first and refuses what cannot fit. Prints progress and, at the end, a table\n"
    "with loss and time of each kind of linear.\n\n"
    "Examples:\n"
    "  quantmill run job.yaml\n"
    "  quantmill run job.yaml --set quantization.bits=3 --set output.directory=out/W3\n"
    "  mpirun -n 2 --bind-to none quantmill run job.yaml --overwrite\n"
    "  srun --mpi=pmix quantmill run job.yaml --log-level debug\n\n";

constexpr const char* plan_help =
    "A dry run: reads headers, never weights, writes nothing, and prints the model, the memory of each "
    "rank,\n"
    "needed and free disk, which rank gets which sequences, rows and files, and an estimate of the time.\n"
    "Start it under the same mpirun or srun as the run. Exits with 2 when the job could not run here, be it\n"
    "because output.directory holds a finished checkpoint: with --overwrite plan asks what run would then "
    "do.\n\n"
    "Examples:\n"
    "  quantmill plan job.yaml\n"
    "  quantmill plan job.yaml --no-measure --set quantization.group_size=64\n"
    "  quantmill plan job.yaml --world-size 64 --gpus-per-node 8\n"
    "  srun --mpi=pmix quantmill plan job.yaml\n\n";

constexpr const char* eval_help =
    "Prints the perplexity of a checkpoint, quantized or not, on held-out tokens: exp of the mean loss of\n"
    "each token given those before it in its sequence, with a 95% confidence interval from a bootstrap over\n"
    "sequences. With --reference, the original model, also how far the predictions moved (KL divergence in\n"
    "nats, share of tokens at which both expect the same) and the error of the hidden states after each\n"
    "block; this tells small damage sooner than perplexity does. docs/evaluation.md defines all of it.\n\n"
    "--text FILE follows the protocol of published WikiText-2 figures: the whole text tokenized at once and\n"
    "cut into windows of L tokens (2048, or the model's positions if fewer) that do not overlap; what is "
    "left\n"
    "at the end is dropped, and only the first window has the BOS, if the tokenizer adds one. It starts\n"
    "tools/calibrate.py with QUANTMILL_PYTHON, build/python or python3.\n\n"
    "Use texts that were not used for calibration; sequences that were are refused.\n\n"
    "Examples:\n"
    "  quantmill eval --model models/Llama-3-8B --tokens heldout.h5\n"
    "  quantmill eval --model models/Llama-3-8B --text wiki.test.txt --sequence-length 2048\n"
    "  mpirun -n 4 quantmill eval --model out/Llama-3-8B-W4g128 --reference models/Llama-3-8B \\\n"
    "      --tokens heldout.h5 --json eval.json\n\n";

constexpr const char* compare_help =
    "Prints two evaluations side by side: perplexity of each and their difference with its own interval,\n"
    "from the same resamples for both, so it is far narrower than the two; KL divergence and top-1 "
    "agreement\n"
    "where both have a reference; bits per weight and size. A and B are files of 'quantmill eval --json', "
    "or\n"
    "checkpoint directories, which are then evaluated as 'quantmill eval' would. Both must have seen the "
    "same\n"
    "sequences.\n\n"
    "Examples:\n"
    "  quantmill compare W4.json W3.json\n"
    "  mpirun -n 4 quantmill compare out/W4 out/W3 --reference models/Llama-3-8B --tokens heldout.h5\n\n";

constexpr const char* inspect_help =
    "Prints a table of a checkpoint (tensors, shapes, schemes, bits, size, bits a weight) and verifies it:\n"
    "index against headers, file sizes, no missing or doubled tensor, codes and scales finite and in range.\n"
    "Exits with 2 when something is wrong.\n\n"
    "Examples:\n"
    "  quantmill inspect out/Llama-3-8B-W4g128\n\n";

std::string job_keys_help() {
    std::vector<std::vector<std::string>> rows;
    for (const auto& key : job_keys())
        rows.push_back({key.path, fmt::format("{}: {} [{}]", key.meaning, key.values, key.default_value)});
    return "Keys of a job file and of --set, with values and [default]; docs/job-spec.md explains them:\n" +
           table_text(rows, "ll", 2) + '\n';
}

std::string more_help(const std::string& command) {
    if (command == "run") return run_help + job_keys_help() + exit_codes;
    if (command == "plan") return std::string(plan_help) + exit_codes;
    if (command == "eval") return std::string(eval_help) + exit_codes;
    if (command == "compare") return std::string(compare_help) + exit_codes;
    if (command == "inspect") return std::string(inspect_help) + exit_codes;
    return std::string(main_help) + exit_codes;
}

std::string selected(const CLI::App& app) {
    const auto chosen = app.get_subcommands();
    return chosen.empty() ? "" : chosen.front()->get_name();
}

// CLI11's text for the selected command, then ours: its own footers are wrapped by newer versions.
std::string full_help(const CLI::App& app) {
    auto text = app.help();
    text.erase(text.find_last_not_of('\n') + 1);
    return text + "\n\n" + more_help(selected(app));
}

// Everything that CLI11 writes into while it parses.
struct Parsed {
    RunCommand run;
    PlanCommand plan;
    EvalCommand eval;
    CompareCommand compare;
    InspectCommand inspect;
    bool no_measure = false;
    std::string log_level;
};

void add_job(CLI::App& command, std::filesystem::path& job, std::vector<std::string>& overrides) {
    command.add_option("job", job, "The job file (YAML)")->required()->type_name("JOB.yaml");
    command
        .add_option("--set", overrides,
                    "Replaces a key of the job, e.g. quantization.bits=3; repeatable, "
                    "later ones win")
        ->type_name("KEY=VALUE")
        ->allow_extra_args(false);  // or it would swallow a job file that follows
}

void add_log_level(CLI::App& command, std::string& level) {
    command.add_option("--log-level", level, "trace | debug | info | warn | error (also: QUANTMILL_LOG)")
        ->type_name("LEVEL")
        ->check(CLI::IsMember(log_levels).description(""));
}

// What eval and compare share.
void add_evaluation(CLI::App& command, EvalCommand& eval) {
    auto* tokens = command.add_option("--tokens", eval.tokens, "Token store, from tools/calibrate.py")
                       ->type_name("STORE.h5");
    command.add_option("--text", eval.text, "Text instead, cut into windows of --sequence-length")
        ->type_name("FILE")
        ->excludes(tokens);
    command.add_option("--reference", eval.reference, "The original model: adds KL, top-1, hidden errors")
        ->type_name("DIR");
    command
        .add_option("--sequence-length", eval.sequence_length,
                    "Cut longer sequences [the store's]; with --text, of a window [2048]")
        ->type_name("L")
        ->check(CLI::Range(2, 1 << 30).description(""));  // one token predicts nothing
    command.add_option("--sequences", eval.sequences, "Use the first N sequences [all]")
        ->type_name("N")
        ->check(CLI::Range(1, 1 << 30).description(""));
    command.add_option("--json", eval.json, "Write the results to this file")->type_name("FILE");
    command.add_option("--backend", eval.backend, "auto | cpu | cuda [auto]")
        ->type_name("NAME")
        ->check(CLI::IsMember({"auto", "cpu", "cuda"}).description(""));
    command.add_flag("--allow-tokenizer-mismatch", eval.allow_tokenizer_mismatch,
                     "Accept a store made with another tokenizer");
    command.add_flag("--allow-calibration-tokens", eval.allow_calibration_tokens,
                     "Evaluate on what the checkpoint was calibrated on too");
}

void add_eval(CLI::App& command, EvalCommand& eval) {
    command.add_option("--model", eval.model, "Checkpoint directory, quantized or not")
        ->required()
        ->type_name("DIR");
    add_evaluation(command, eval);
    command.add_option("--logits", eval.logits, "Write all logits to this file, for comparisons")
        ->type_name("FILE.safetensors");
}

void add_compare(CLI::App& command, CompareCommand& compare) {
    command.add_option("a", compare.a, "File of eval --json, or checkpoint directory")
        ->required()
        ->type_name("A");
    command.add_option("b", compare.b, "Another one")->required()->type_name("B");
    add_evaluation(command, compare.eval);
}

void add_commands(CLI::App& app, Parsed& parsed) {
    auto* run = app.add_subcommand("run", "Quantize a checkpoint as a job file says");
    add_job(*run, parsed.run.job, parsed.run.overrides);
    run->add_flag("--overwrite", parsed.run.overwrite,
                  "Replace an earlier result of ours in output.directory, never another model");
    auto* plan = app.add_subcommand("plan", "Show what a run would need and do, without doing it");
    add_job(*plan, parsed.plan.job, parsed.plan.overrides);
    plan->add_flag("--no-measure", parsed.no_measure, "Do not measure this machine, estimate no time");
    plan->add_flag("--overwrite", parsed.plan.overwrite, "Plan for a run with --overwrite");
    auto* size = plan->add_option("--world-size", parsed.plan.world_size,
                                  "Plan for N ranks like this one, which need not be there")
                     ->type_name("N")
                     ->check(CLI::Range(1, 1 << 16).description(""));
    plan->add_option("--gpus-per-node", parsed.plan.gpus_per_node, "Of them, M on a node [all]")
        ->type_name("M")
        ->needs(size)
        ->check(CLI::Range(1, 1 << 16).description(""));
    add_eval(*app.add_subcommand("eval", "Measure the perplexity of a checkpoint"), parsed.eval);
    add_compare(*app.add_subcommand("compare", "Put two evaluations side by side"), parsed.compare);
    app.add_subcommand("inspect", "List and verify a checkpoint")
        ->add_option("directory", parsed.inspect.directory, "Checkpoint directory")
        ->required()
        ->type_name("DIR");
    for (auto* command : app.get_subcommands({})) add_log_level(*command, parsed.log_level);
}

PrintCommand mistake(const std::string& message, const std::string& command) {
    const auto name = command.empty() ? "quantmill" : "quantmill " + command;
    return {ExitCode::bad_input, fmt::format("{}: {}\nSee {} --help.\n", name, message, name)};
}

// A first word that is no command: CLI11 would only say that a command is missing.
std::optional<PrintCommand> unknown_command(const std::string& word) {
    if (word.starts_with('-') || std::ranges::find(commands, word) != commands.end()) return std::nullopt;
    const auto nearest = nearest_word(word, commands);
    return mistake(fmt::format("{} is not a command ({}){}", word, fmt::join(commands, " | "),
                               nearest ? "; did you mean " + *nearest + "?" : ""),
                   "");
}

std::optional<PrintCommand> choose_log_level(const std::string& option, std::string& level) {
    const char* environment = std::getenv("QUANTMILL_LOG");
    if (!option.empty()) {
        level = option;
    } else if (environment != nullptr && *environment != '\0') {
        level = environment;
        if (std::ranges::find(log_levels, level) == log_levels.end())
            return mistake(fmt::format("QUANTMILL_LOG={} in the environment is not allowed ({})", level,
                                       fmt::join(log_levels, " | ")),
                           "");
    }
    return std::nullopt;
}

}  // namespace

CommandLine parse_command_line(int argc, const char* const* argv, const std::string& version) {
    CLI::App app("Turns a Hugging Face checkpoint into a GPTQ checkpoint, on one machine or many.",
                 "quantmill");
    Parsed parsed;
    app.set_version_flag("--version", version, "Print commit, compilers and built backends");
    app.require_subcommand(1);
    add_commands(app, parsed);

    if (argc < 2) return {PrintCommand{ExitCode::bad_input, full_help(app)}};
    if (const auto print = unknown_command(argv[1])) return {*print};
    try {
        app.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
        return {PrintCommand{ExitCode::ok, full_help(app)}};
    } catch (const CLI::CallForVersion&) {
        return {PrintCommand{ExitCode::ok, version + '\n'}};
    } catch (const CLI::ParseError& error) {
        return {mistake(error.what(), selected(app))};
    }

    if (selected(app) == "eval" && parsed.eval.tokens.empty() && parsed.eval.text.empty()) {
        return {mistake("--tokens STORE.h5 or --text FILE is required", "eval")};
    }

    CommandLine line;
    if (const auto print = choose_log_level(parsed.log_level, line.log_level)) return {*print};
    parsed.plan.measure = !parsed.no_measure;
    const auto command = selected(app);
    if (command == "run") line.command = parsed.run;
    if (command == "plan") line.command = parsed.plan;
    if (command == "eval") line.command = parsed.eval;
    if (command == "compare") line.command = parsed.compare;
    if (command == "inspect") line.command = parsed.inspect;
    return line;
}

}  // namespace quantmill
