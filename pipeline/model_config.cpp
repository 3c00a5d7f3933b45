#include "pipeline/model_config.h"

#include <array>

namespace quantmill {
namespace {

// Parts of field names by which families have so far announced changes to the forward pass.
constexpr std::array<std::string_view, 23> kMathematicalWords{
    "multiplier", "softcap",     "scaling", "scale",      "rope",       "rotary",  "norm",     "window",
    "expert",     "moe",         "bias",    "activation", "hidden_act", "alibi",   "clip",     "qkv",
    "residual",   "layer_types", "kv_lora", "q_lora",     "partial",    "no_rope", "per_layer"};

// Fields with such a word in them that do not change inference.
constexpr std::array<std::string_view, 5> kHarmlessFields{
    "max_window_layers", "rms_norm_eps", "layer_norm_eps", "norm_eps", "router_aux_loss_coef"};

bool sounds_like_mathematics(const std::string& field) {
    for (const auto harmless : kHarmlessFields) {
        if (field == harmless) return false;
    }
    for (const auto word : kMathematicalWords) {
        if (field.find(word) != std::string::npos) return true;
    }
    return false;
}

bool is_switched_on(const nlohmann::json& value) {
    if (value.is_null()) return false;
    if (value.is_boolean()) return value.get<bool>();
    if (value.is_number()) return value.get<double>() != 0.0 && value.get<double>() != 1.0;
    return !value.empty();
}

}  // namespace

const nlohmann::json* ModelConfig::find(const std::string& field) {
    read_.insert(field);
    const auto it = json_.find(field);
    return it == json_.end() || it->is_null() ? nullptr : &*it;
}

std::int64_t ModelConfig::integer(const std::string& field) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) throw BadInput("{}: field '{}' is missing", file_, field);
    if (!value->is_number_integer() || value->get<std::int64_t>() <= 0) {
        throw BadInput("{}: field '{}' is {}, expected a positive integer", file_, field, value->dump());
    }
    return value->get<std::int64_t>();
}

std::int64_t ModelConfig::integer(const std::string& field, std::int64_t fallback) {
    return find(field) == nullptr ? fallback : integer(field);
}

double ModelConfig::number(const std::string& field) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) throw BadInput("{}: field '{}' is missing", file_, field);
    if (!value->is_number()) {
        throw BadInput("{}: field '{}' is {}, expected a number", file_, field, value->dump());
    }
    return value->get<double>();
}

double ModelConfig::number(const std::string& field, double fallback) {
    return find(field) == nullptr ? fallback : number(field);
}

bool ModelConfig::boolean(const std::string& field, bool fallback) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) {
        throw BadInput("{}: field '{}' is {}, expected true or false", file_, field, value->dump());
    }
    return value->get<bool>();
}

std::string ModelConfig::text(const std::string& field, const std::string& fallback) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) return fallback;
    if (!value->is_string()) {
        throw BadInput("{}: field '{}' is {}, expected a string", file_, field, value->dump());
    }
    return value->get<std::string>();
}

std::vector<std::string> ModelConfig::texts(const std::string& field) {
    const nlohmann::json* value = find(field);
    if (value == nullptr) return {};
    try {
        return value->get<std::vector<std::string>>();
    } catch (const nlohmann::json::exception&) {
        throw BadInput("{}: field '{}' is {}, expected a list of strings", file_, field, value->dump());
    }
}

const nlohmann::json& ModelConfig::object(const std::string& field) {
    static const nlohmann::json null;
    const nlohmann::json* value = find(field);
    if (value == nullptr) return null;
    if (!value->is_object()) {
        throw BadInput("{}: field '{}' is {}, expected an object", file_, field, value->dump());
    }
    return *value;
}

void ModelConfig::refuse_unread_mathematics() const {
    for (const auto& [field, value] : json_.items()) {
        if (read_.contains(field) || !sounds_like_mathematics(field) || !is_switched_on(value)) continue;
        throw BadInput(
            "{}: field '{}' is {}: it seems to change the model's mathematics, which this version does not "
            "implement for this architecture",
            file_, field, value.dump());
    }
}

}  // namespace quantmill
