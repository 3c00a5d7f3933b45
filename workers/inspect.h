#pragma once

#include <filesystem>
#include <string>

namespace quantmill {

// `quantmill inspect`: a table of a checkpoint directory, plain or GPTQ, as text. Throws BadInput for what is
// wrong with it: index against headers, and all that verify_checkpoint finds.
std::string inspect_checkpoint(const std::filesystem::path& directory);

}  // namespace quantmill
