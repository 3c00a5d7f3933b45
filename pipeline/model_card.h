#pragma once

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace quantmill {

// What the README.md of a quantized checkpoint says: names, settings and results, never paths, accounts or
// the environment. Rows are (label, value).
struct ModelCard {
    std::string base_model;  // "HuggingFaceTB/SmolLM2-135M-Instruct", or the directory's name
    std::string title;       // "SmolLM2-135M-Instruct, 4-bit GPTQ"
    std::string version;     // of this program
    std::vector<std::pair<std::string, std::string>> quantization;
    std::vector<std::pair<std::string, std::string>> calibration;
    std::vector<std::vector<std::string>> results;  // a header row, then rows
};

// "org/name" of a hub cache directory (models--org--name/snapshots/…) or of a link to one; else the id in
// config.json's _name_or_path or the card's base_model that ends in the directory's name, or any such id when
// that name is a commit's; else the directory's name. An id of another name is that of a model it was trained
// from.
std::string base_model_name(const std::filesystem::path& model_directory);

// Markdown with a YAML front matter; license and the like are taken over from the source's README.md when it
// has them.
std::string to_markdown(const ModelCard& card, const std::filesystem::path& source_directory);

}  // namespace quantmill
