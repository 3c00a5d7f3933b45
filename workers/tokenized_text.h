#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "workers/cli.h"

namespace quantmill {

// What --text asks for: the windows of a text by the protocol of docs/evaluation.md.
struct TextRequest {
    std::filesystem::path model;  // whose tokenizer.json tokenizes
    std::filesystem::path text;
    std::optional<std::int64_t> length;  // of a window; default: 2048, or the model's positions if fewer
};
TextRequest text_request(const EvalCommand& command);

// A text that tools/calibrate.py has tokenized into a store in a temporary directory, removed at the end.
// Starts the tool and waits for it: a process should do so before MPI starts, so what goes wrong is only
// kept for store() to throw, once the ranks have met and all can end.
class TokenizedText {
public:
    explicit TokenizedText(const TextRequest& request);
    ~TokenizedText();
    TokenizedText(const TokenizedText&) = delete;
    TokenizedText& operator=(const TokenizedText&) = delete;

    // Throws BadInput with the remedy and the equivalent command when there is none.
    std::filesystem::path store() const;

private:
    void tokenize(const TextRequest& request);

    std::filesystem::path directory_;
    std::optional<std::string> error_;
};

// Where the tool is: QUANTMILL_PYTHON or the environment beside the build, else python3 of the PATH; the
// script of this source tree or of the installation. Throws BadInput when there is no script.
struct PythonTool {
    std::string python;
    std::filesystem::path script;
};
PythonTool find_calibrate_tool(const std::filesystem::path& program_directory);

}  // namespace quantmill
