#pragma once

#include <regex>
#include <string>
#include <string_view>

namespace quantmill {

inline constexpr std::string_view kRegexPrefix = "re:";

// Names of modules ("model.layers.3.self_attn.q_proj") as a job writes them: a glob of *, ?, [abc], or behind
// "re:" a regular expression (ECMAScript); either must match a whole name.
class ModulePattern {
public:
    explicit ModulePattern(const std::string& text);  // throws std::regex_error
    bool matches(const std::string& module) const { return std::regex_match(module, regex_); }

private:
    std::regex regex_;
};

}  // namespace quantmill
