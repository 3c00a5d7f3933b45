#include "pipeline/model_card.h"

#include <spdlog/spdlog.h>
#include <yaml-cpp/yaml.h>

#include <nlohmann/json.hpp>
#include <string_view>

#include "pipeline/files.h"

namespace quantmill {
namespace {

enum class BrokenFrontMatter { warn, ignore };

// The front matter between the first two "---" lines, or an empty map.
YAML::Node front_matter_of(const std::filesystem::path& readme, BrokenFrontMatter broken) {
    if (!std::filesystem::exists(readme)) return YAML::Node(YAML::NodeType::Map);
    const std::string text = read_text(readme);
    const auto end = text.starts_with("---\n") ? text.find("\n---", 3) : std::string::npos;
    if (end == std::string::npos) return YAML::Node(YAML::NodeType::Map);
    try {
        const YAML::Node node = YAML::Load(text.substr(4, end - 3));
        if (node.IsMap()) return node;
    } catch (const YAML::Exception& error) {
        if (broken == BrokenFrontMatter::ignore) return YAML::Node(YAML::NodeType::Map);
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

// "org/name" or "name" of a path below models--org--name or models--name; empty elsewhere.
std::string id_of_hub_cache(const std::filesystem::path& path) {
    constexpr std::string_view prefix = "models--";
    for (const auto& part : path) {
        const std::string name = part.string();
        if (!name.starts_with(prefix) || name.size() == prefix.size()) continue;
        const auto middle = name.find("--", prefix.size());
        if (middle == std::string::npos) return name.substr(prefix.size());
        return name.substr(prefix.size(), middle - prefix.size()) + "/" + name.substr(middle + 2);
    }
    return {};
}

std::string directory_name(const std::filesystem::path& path) {
    return path.has_filename() ? path.filename().string() : path.parent_path().filename().string();
}

bool consists_of(std::string_view text, std::string_view letters) {
    return !text.empty() && text.find_first_not_of(letters) == std::string_view::npos;
}

// The name of a directory that only a snapshot has.
bool is_commit(const std::string& name) { return name.size() == 40 && consists_of(name, "0123456789abcdef"); }

// "org/name", and no path.
bool looks_like_id(const std::string& text) {
    constexpr std::string_view letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.";
    const auto slash = text.find('/');
    if (slash == std::string::npos || text.starts_with(".")) return false;
    return consists_of(text.substr(0, slash), letters) && consists_of(text.substr(slash + 1), letters);
}

// Names that the model's own card and config give: its own, or those of what it was trained from.
std::vector<std::string> ids_in_documents(const std::filesystem::path& directory) {
    std::vector<std::string> ids;
    const auto config = directory / "config.json";
    if (std::filesystem::exists(config)) {
        const auto json = nlohmann::json::parse(read_text(config), nullptr, false);
        if (json.is_object() && json.contains("_name_or_path") && json.at("_name_or_path").is_string()) {
            ids.push_back(json.at("_name_or_path").get<std::string>());
        }
    }
    const YAML::Node base = front_matter_of(directory / "README.md", BrokenFrontMatter::ignore)["base_model"];
    if (base && base.IsScalar()) ids.push_back(base.as<std::string>());
    if (base && base.IsSequence() && base.size() == 1 && base[0].IsScalar()) {
        ids.push_back(base[0].as<std::string>());
    }
    std::erase_if(ids, [](const std::string& id) { return !looks_like_id(id); });
    return ids;
}

}  // namespace

std::string base_model_name(const std::filesystem::path& model_directory) {
    const auto directory = std::filesystem::absolute(model_directory).lexically_normal();
    std::error_code ignored;
    auto resolved = std::filesystem::weakly_canonical(directory, ignored);
    if (ignored) resolved = directory;
    for (const auto& path : {directory, resolved}) {
        if (const std::string id = id_of_hub_cache(path); !id.empty()) return id;
    }
    // A directory may bear any name, but one that a document of the model bears out is the model's.
    const std::string target = directory_name(resolved);
    std::string name = directory_name(directory);
    for (const std::string& id : ids_in_documents(resolved)) {
        const std::string last = id.substr(id.rfind('/') + 1);
        if (last == name || last == target || is_commit(name)) return id;
    }
    return name;
}

std::string to_markdown(const ModelCard& card, const std::filesystem::path& source_directory) {
    const YAML::Node source = front_matter_of(source_directory / "README.md", BrokenFrontMatter::warn);
    std::string text = "---\n" + front_matter(card, source) + "\n---\n\n# " + card.title + "\n\n";
    text += "Quantized from " + card.base_model + " with quantmill " + card.version + ".\n";
    text += "\n## Quantization\n\n" + settings(card.quantization);
    text += "\n## Calibration\n\n" + settings(card.calibration);
    text += "\n## Results\n\n" + table(card.results);
    return text;
}

}  // namespace quantmill
