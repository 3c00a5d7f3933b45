#include "pipeline/model_card.h"

#include <spdlog/spdlog.h>
#include <yaml-cpp/yaml.h>

#include "pipeline/files.h"

namespace quantmill {
namespace {

// The front matter between the first two "---" lines, or an empty map.
YAML::Node front_matter_of(const std::filesystem::path& readme) {
    if (!std::filesystem::exists(readme)) return YAML::Node(YAML::NodeType::Map);
    const std::string text = read_text(readme);
    const auto end = text.starts_with("---\n") ? text.find("\n---", 3) : std::string::npos;
    if (end == std::string::npos) return YAML::Node(YAML::NodeType::Map);
    try {
        const YAML::Node node = YAML::Load(text.substr(4, end - 3));
        if (node.IsMap()) return node;
    } catch (const YAML::Exception& error) {
        spdlog::warn("{}: its front matter is not YAML and is not taken over: {}", readme.string(),
                     error.what());
    }
    return YAML::Node(YAML::NodeType::Map);
}

std::string front_matter(const ModelCard& card, const YAML::Node& source) {
    YAML::Emitter out;
    out << YAML::BeginMap;
    for (const char* key : {"license", "license_name", "license_link", "language"}) {
        if (source[key]) out << YAML::Key << key << YAML::Value << source[key];
    }
    const std::string pipeline =
        source["pipeline_tag"] ? source["pipeline_tag"].as<std::string>() : "text-generation";
    out << YAML::Key << "library_name" << YAML::Value << "transformers";
    out << YAML::Key << "pipeline_tag" << YAML::Value << pipeline;
    out << YAML::Key << "base_model" << YAML::Value << card.base_model;
    out << YAML::Key << "base_model_relation" << YAML::Value << "quantized";
    out << YAML::Key << "quantized_by" << YAML::Value << "quantmill";
    out << YAML::Key << "tags" << YAML::Value << YAML::BeginSeq << "gptq" << "quantized" << "quantmill"
        << YAML::EndSeq;
    out << YAML::EndMap;
    return out.c_str();
}

std::string line_of(const std::vector<std::string>& cells) {
    std::string line = "|";
    for (const std::string& cell : cells) line += " " + cell + " |";
    return line + "\n";
}

std::string table(const std::vector<std::vector<std::string>>& rows) {
    std::string text = line_of(rows.front());
    text += line_of(std::vector<std::string>(rows.front().size(), "---"));
    for (std::size_t i = 1; i < rows.size(); ++i) text += line_of(rows[i]);
    return text;
}

std::string settings(const std::vector<std::pair<std::string, std::string>>& rows) {
    std::vector<std::vector<std::string>> cells{{"setting", "value"}};
    for (const auto& [label, value] : rows) cells.push_back({label, value});
    return table(cells);
}

}  // namespace

std::string base_model_name(const std::filesystem::path& model_directory) {
    const auto directory = std::filesystem::absolute(model_directory).lexically_normal();
    for (const auto& part : directory) {
        const std::string name = part.string();
        if (!name.starts_with("models--")) continue;
        const auto middle = name.find("--", 8);
        if (middle != std::string::npos) return name.substr(8, middle - 8) + "/" + name.substr(middle + 2);
    }
    return directory.has_filename() ? directory.filename().string()
                                    : directory.parent_path().filename().string();
}

std::string to_markdown(const ModelCard& card, const std::filesystem::path& source_directory) {
    const YAML::Node source = front_matter_of(source_directory / "README.md");
    std::string text = "---\n" + front_matter(card, source) + "\n---\n\n# " + card.title + "\n\n";
    text += "Quantized from " + card.base_model + " with quantmill " + card.version + ".\n";
    text += "\n## Quantization\n\n" + settings(card.quantization);
    text += "\n## Calibration\n\n" + settings(card.calibration);
    text += "\n## Results\n\n" + table(card.results);
    return text;
}

}  // namespace quantmill
