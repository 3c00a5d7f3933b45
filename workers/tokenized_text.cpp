#include "workers/tokenized_text.h"

#include <fcntl.h>
#include <fmt/ranges.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "kernels/error.h"
#include "pipeline/checkpoint_reader.h"
#include "pipeline/model_graph.h"

extern char** environ;

namespace quantmill {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kUsualLength = 2048;

std::int64_t length_of(const TextRequest& request) {
    if (request.length) return *request.length;
    const CheckpointReader reader(request.model);
    const ModelGraph graph = build_model_graph(reader.config(), (request.model / "config.json").string());
    return std::min(kUsualLength, graph.max_positions);
}

std::vector<std::string> command_of(const PythonTool& tool, const TextRequest& request, std::int64_t length,
                                    const fs::path& output) {
    return {
        tool.python,           tool.script.string(), "--tokenizer",       request.model.string(), "--text",
        request.text.string(), "--windows",          "--sequence-length", std::to_string(length), "--output",
        output.string()};
}

// Runs a program without a shell, its output discarded, its messages passed on. Returns its exit code, or
// -1 when it could not be started or was killed.
int run_program(std::vector<std::string> words) {
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    pid_t process = 0;
    const int failure = posix_spawnp(&process, arguments[0], &actions, nullptr, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    if (failure != 0) return -1;
    int status = 0;
    while (waitpid(process, &status, 0) < 0) {
        if (errno != EINTR) return -1;
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

fs::path make_temporary_directory() {
    std::string path = (fs::temp_directory_path() / "quantmill-text-XXXXXX").string();
    if (mkdtemp(path.data()) == nullptr) {
        throw InfrastructureError("cannot make the directory {} for the tokens of --text: {}", path,
                                  std::strerror(errno));
    }
    return path;
}

}  // namespace

TextRequest text_request(const EvalCommand& command) {
    return {command.model, command.text, command.sequence_length};
}

PythonTool find_calibrate_tool(const fs::path& program_directory) {
    PythonTool tool{"python3", {}};
    const char* chosen = std::getenv("QUANTMILL_PYTHON");
    const fs::path beside_build = program_directory / ".." / "python" / "bin" / "python";
    if (chosen != nullptr && *chosen != '\0') {
        tool.python = chosen;
    } else if (fs::exists(beside_build)) {
        tool.python = beside_build.lexically_normal().string();
    }
    for (const char* place : {"../share/quantmill/tools", "../../tools"}) {
        tool.script = (program_directory / place / "calibrate.py").lexically_normal();
        if (fs::exists(tool.script)) return tool;
    }
    throw BadInput(
        "--text needs tools/calibrate.py, which is neither in the share directory of this installation nor "
        "in the source tree around {}; run it yourself and pass its store: python3 tools/calibrate.py "
        "--tokenizer MODEL --text FILE --windows --sequence-length L --output tokens.h5, then --tokens "
        "tokens.h5",
        program_directory.string());
}

TokenizedText::TokenizedText(const TextRequest& request) {
    try {
        tokenize(request);
    } catch (const std::exception& error) {
        error_ = error.what();
    }
}

void TokenizedText::tokenize(const TextRequest& request) {
    const PythonTool tool = find_calibrate_tool(fs::canonical("/proc/self/exe").parent_path());
    const std::int64_t length = length_of(request);
    directory_ = make_temporary_directory();
    const int code = run_program(command_of(tool, request, length, store()));
    if (code == 0) return;
    const std::string reason = code < 0 ? "could not be run" : fmt::format("ended with code {}", code);
    throw BadInput(
        "tokenizing {} failed: {} {} (what it said is above). It needs Python with the packages of "
        "tools/requirements.txt: tools/python_env.sh makes build/python, or set QUANTMILL_PYTHON. The same "
        "by hand: {}; then --tokens tokens.h5 instead of --text",
        request.text.string(), tool.python, reason,
        fmt::join(command_of(tool, request, length, "tokens.h5"), " "));
}

TokenizedText::~TokenizedText() {
    std::error_code ignored;
    if (!directory_.empty()) fs::remove_all(directory_, ignored);
}

fs::path TokenizedText::store() const {
    if (error_) throw BadInput("{}", *error_);
    return directory_ / "tokens.h5";
}

}  // namespace quantmill
