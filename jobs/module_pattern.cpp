#include "jobs/module_pattern.h"

namespace quantmill {
namespace {

std::string regex_of_glob(const std::string& glob) {
    std::string regex;
    for (const char c : glob) {
        if (c == '*') {
            regex += ".*";
        } else if (c == '?') {
            regex += '.';
        } else {
            if (std::string_view("\\^$.|(){}+").find(c) != std::string_view::npos) regex += '\\';
            regex += c;
        }
    }
    return regex;
}

}  // namespace

ModulePattern::ModulePattern(const std::string& text)
    : regex_(text.starts_with(kRegexPrefix) ? text.substr(kRegexPrefix.size()) : regex_of_glob(text)) {}

}  // namespace quantmill
