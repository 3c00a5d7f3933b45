#include "pipeline/quantization_config.h"

namespace quantmill {

nlohmann::ordered_json to_json(const QuantizationConfig& config) {
    const std::string format(name_of(config.format));
    nlohmann::ordered_json json{{"bits", config.bits},
                                {"group_size", config.group_size},
                                // Static groups leave g_idx sorted, so that fast kernels are right.
                                {"desc_act", config.desc_act && !config.static_groups},
                                {"sym", config.sym},
                                {"lm_head", config.lm_head},
                                {"quant_method", "gptq"},
                                {"method", "gptq"},
                                {"checkpoint_format", format},
                                {"format", format},
                                {"pack_dtype", "int32"},
                                {"dynamic", config.dynamic},
                                {"meta",
                                 {{"quantizer", {"quantmill:" + config.version}},
                                  {"damp_percent", config.damp_percent.value_or(0.0)},
                                  {"damp_auto_increment", config.damp_auto_increment},
                                  {"true_sequential", config.true_sequential},
                                  {"act_group_aware", config.act_group_aware},
                                  {"static_groups", config.static_groups},
                                  {"mse", config.scale_search == "mse" ? 2.4 : 0.0},
                                  {"scale_search", config.scale_search},
                                  {"signed_scales", config.signed_scales},
                                  {"scale_rounding", config.scale_rounding}}}};
    if (!config.damp_percent) json["meta"].erase("damp_percent");
    if (config.error_propagation_alpha > 0.0) {
        json["meta"]["error_propagation_alpha"] = config.error_propagation_alpha;
    }
    if (!config.modules_in_block_to_quantize.is_null()) {
        json["modules_in_block_to_quantize"] = config.modules_in_block_to_quantize;
    }
    return json;
}

nlohmann::ordered_json quantized_config(const nlohmann::ordered_json& source,
                                        const QuantizationConfig& config) {
    nlohmann::ordered_json result = source;
    if (config.lm_head) result["tie_word_embeddings"] = false;
    result["quantization_config"] = to_json(config);
    return result;
}

}  // namespace quantmill
