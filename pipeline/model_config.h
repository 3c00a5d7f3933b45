#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/error.h"

namespace quantmill {

// A model's config.json as its family reads it. Every getter throws BadInput naming file and field; the
// fields that were read are remembered, so that the rest can be held against those known to be harmless.
class ModelConfig {
public:
    ModelConfig(const nlohmann::json& json, std::string file) : json_(json), file_(std::move(file)) {}

    const std::string& file() const { return file_; }
    std::int64_t integer(const std::string& field);
    std::int64_t integer(const std::string& field, std::int64_t fallback);  // absent or null: fallback
    double number(const std::string& field, double fallback);
    double number(const std::string& field);
    bool boolean(const std::string& field, bool fallback);
    std::string text(const std::string& field, const std::string& fallback);
    std::vector<std::string> texts(const std::string& field);  // absent or null: empty
    // The value of an object field, or null.
    const nlohmann::json& object(const std::string& field);

    // Throws BadInput for a field that no getter read and that is not known to change nothing; nulls, empty
    // lists and empty objects pass.
    void refuse_unknown_fields() const;

private:
    const nlohmann::json* find(const std::string& field);

    const nlohmann::json& json_;
    std::string file_;
    std::set<std::string> read_;
};

}  // namespace quantmill
