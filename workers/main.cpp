// One binary, the same program on every rank: reads the command line, joins the other ranks, acts, and turns
// an error on any rank into the end of all with that rank's message.

#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdio>
#include <memory>

#include "comm/control.h"
#include "comm/launcher.h"
#include "kernels/cpu/process_environment.h"
#include "workers/cli.h"
#include "workers/compare.h"
#include "workers/evaluate.h"
#include "workers/inspect.h"
#include "workers/live_line.h"
#include "workers/run_job.h"
#include "workers/version.h"

namespace quantmill {
namespace {

// Info of rank 0 only; warnings of all ranks, each line with its host and rank.
void set_up_logging(const std::string& level, const Control& control) {
    auto logger = spdlog::stderr_color_mt("quantmill");
    const auto wanted = spdlog::level::from_str(level == "warn" ? "warning" : level);
    const bool quiet = control.rank() > 0 && wanted == spdlog::level::info;
    logger->set_level(quiet ? spdlog::level::warn : wanted);
    // On a terminal a message takes the place of the live line (Progress), which comes back below it.
    logger->set_pattern(
        fmt::format("{}%H:%M:%S [{}:{}] %^%l%$ %v", live_line_eraser(), control.host(), control.rank()));
    spdlog::set_default_logger(std::move(logger));
}

struct Act {
    Control& control;
    const TokenizedText* text;  // of --text, where this process tokenized it

    void operator()(const RunCommand& command) const { run_job(command, control); }
    void operator()(const PlanCommand& command) const { plan_job(command, control); }
    void operator()(const EvalCommand& command) const { evaluate(command, control, text); }
    void operator()(const CompareCommand& command) const { compare(command, control, text); }
    void operator()(const InspectCommand& command) const {
        if (control.rank() == 0) fmt::print("{}", inspect_checkpoint(command.directory));
    }
    void operator()(const PrintCommand&) const {}  // printed before the ranks met
};

// What should be one rank for each task of an allocation; the other commands only look at files.
bool is_parallel(const CommandLine& line) {
    return std::holds_alternative<RunCommand>(line.command) ||
           std::holds_alternative<EvalCommand>(line.command) ||
           std::holds_alternative<CompareCommand>(line.command);
}

// Starts another program, which a process that MPI runs in should not.
std::unique_ptr<TokenizedText> tokenize_text(const CommandLine& line) {
    TextRequest request;
    if (const auto* eval = std::get_if<EvalCommand>(&line.command)) {
        request = text_request(*eval);
    } else if (const auto* compare = std::get_if<CompareCommand>(&line.command)) {
        request = text_request(compare->eval);
        request.model = std::filesystem::is_directory(compare->a) ? compare->a : compare->b;
        if (!std::filesystem::is_directory(request.model)) return nullptr;  // two files of results
    }
    if (request.text.empty() || launched_rank() != 0) return nullptr;
    return std::make_unique<TokenizedText>(request);
}

ExitCode act(const CommandLine& line, Control& control, const TokenizedText* text) {
    try {
        std::visit(Act{control, text}, line.command);
        return ExitCode::ok;
    } catch (const Error& error) {
        spdlog::error("{}", error.what());
        return error.code();
    } catch (const std::exception& error) {
        spdlog::error("internal error: {}", error.what());
        return ExitCode::internal;
    }
}

int main_of_rank(int argc, char** argv) {
    const CommandLine line = parse_command_line(argc, argv, version_text());
    if (const auto* print = std::get_if<PrintCommand>(&line.command)) {
        fmt::print(print->code == ExitCode::ok ? stdout : stderr, "{}", print->text);
        return static_cast<int>(print->code);
    }
    const std::unique_ptr<TokenizedText> text = tokenize_text(line);
    std::unique_ptr<Control> control;
    try {
        control = make_control(under_launcher(), is_parallel(line));
    } catch (const Error& error) {
        fmt::print(stderr, "quantmill: {}\n", error.what());
        return static_cast<int>(error.code());
    }
    set_up_logging(line.log_level, *control);
    const ExitCode code = act(line, *control, text.get());
    if (code != ExitCode::ok) control->abort(code);
    return 0;
}

}  // namespace
}  // namespace quantmill

int main(int argc, char** argv) {
    quantmill::settle_process_environment(argv);
    return quantmill::main_of_rank(argc, argv);
}
