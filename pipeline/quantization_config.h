#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "pipeline/gptq_format.h"

namespace quantmill {

// What config.json's quantization_config and quantize_config.json tell loaders; `desc_act` is the job's.
struct QuantizationConfig {
    int bits = 4;
    std::int64_t group_size = 128;  // -1: one group a row
    bool sym = true;
    bool desc_act = false;
    std::optional<double> damp_percent = 0.05;  // none: not one for all
    double damp_auto_increment = 0.01;
    bool true_sequential = true;
    GptqFormat format = GptqFormat::v1;
    std::string version;  // of this program
    double error_propagation_alpha = 0.0;
    bool act_group_aware = false;
    bool static_groups = false;
    std::string scale_search = "minmax";
    bool signed_scales = false;
    std::string scale_rounding = "fp16";                           // fp16 or bf16
    bool lm_head = false;                                          // it is quantized too
    nlohmann::ordered_json dynamic, modules_in_block_to_quantize;  // of quantization_scheme.h; null: absent
};

nlohmann::ordered_json to_json(const QuantizationConfig& config);

// config.json of the source with the quantization_config added; a quantized lm_head is not the embedding.
nlohmann::ordered_json quantized_config(const nlohmann::ordered_json& source,
                                        const QuantizationConfig& config);

}  // namespace quantmill
