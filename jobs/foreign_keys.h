#pragma once

#include <optional>
#include <string>

namespace quantmill {

// What to say to somebody who writes a key of GPTQModel, AutoGPTQ, AutoAWQ or llm-compressor, or a key of
// ours that a later version brings; nothing for any other word. `path` is dotted, as in "quantization.mse".
std::optional<std::string> advice_for_foreign_key(const std::string& path);

}  // namespace quantmill
