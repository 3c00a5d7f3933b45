#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace quantmill {

// Exit codes of the program; docs/job-spec.md explains them to users.
enum class ExitCode : int { ok = 0, bad_input = 2, internal = 70, infrastructure = 75, stopped = 85 };

// Base of every error we throw: a message that names the file, key or rank and the remedy, and
// the exit code the process ends with.
class Error : public std::runtime_error {
public:
    Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
    ExitCode code() const { return code_; }

private:
    ExitCode code_;
};

// The user's files, keys or arguments are wrong; trying again without a change is useless.
class BadInput : public Error {
public:
    template <class... Args>
    explicit BadInput(fmt::format_string<Args...> format, Args&&... args)
        : Error(ExitCode::bad_input, fmt::format(format, std::forward<Args>(args)...)) {}
};

// A broken promise between parts of this program.
class InternalError : public Error {
public:
    template <class... Args>
    explicit InternalError(fmt::format_string<Args...> format, Args&&... args)
        : Error(ExitCode::internal, fmt::format(format, std::forward<Args>(args)...)) {}
};

// A disk, network, GPU or peer rank failed; the same job may succeed elsewhere or later.
class InfrastructureError : public Error {
public:
    template <class... Args>
    explicit InfrastructureError(fmt::format_string<Args...> format, Args&&... args)
        : Error(ExitCode::infrastructure, fmt::format(format, std::forward<Args>(args)...)) {}
};

}  // namespace quantmill
