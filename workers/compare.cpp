#include "workers/compare.h"

#include <fmt/format.h>

#include "pipeline/files.h"
#include "workers/evaluate.h"

namespace quantmill {
namespace {

Evaluation evaluation_of(const std::filesystem::path& path, const CompareCommand& command, Control& control,
                         const TokenizedText* text) {
    if (!std::filesystem::is_directory(path)) {
        const auto json = nlohmann::json::parse(read_text(path), nullptr, false);
        return evaluation_from(json, path.string());
    }
    EvalCommand eval = command.eval;
    eval.model = path;
    if (eval.tokens.empty() && eval.text.empty()) {
        throw BadInput("{} is a checkpoint: to evaluate it, compare needs --tokens STORE.h5 or --text FILE",
                       path.string());
    }
    return measure(eval, control, text);
}

}  // namespace

void compare(const CompareCommand& command, Control& control, const TokenizedText* text) {
    const Evaluation a = evaluation_of(command.a, command, control, text);
    const Evaluation b = evaluation_of(command.b, command, control, text);
    if (control.rank() != 0) return;
    fmt::print("{}", comparison_text(a, b));
    if (command.eval.json) write_text(*command.eval.json, json_text(comparison_json(a, b)));
}

}  // namespace quantmill
