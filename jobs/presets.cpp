#include "jobs/presets.h"

#include <algorithm>

#include "kernels/error.h"

namespace quantmill {
namespace {

struct Preset {
    std::string name;
    bool act_group_aware;
    std::string scale_search;
    bool signed_scales;
    std::string scale_rounding;
    bool refit;
    int sweeps;
    double error_propagation_alpha;
};

// docs/quality.md has what each is worth.
const std::vector<Preset>& presets() {
    static const std::vector<Preset> table{
        {"plain", false, "minmax", false, "fp16", false, 0, 0.0},
        {"gptqmodel", true, "minmax", false, "fp16", false, 0, 0.0},
        {"balanced", true, "hessian", true, "auto", false, 0, 0.0},
        {"best", true, "hessian", true, "auto", true, 2, 1.0},
    };
    return table;
}

}  // namespace

const std::vector<std::string>& preset_names() {
    static const std::vector<std::string> names = [] {
        std::vector<std::string> all;
        for (const Preset& preset : presets()) all.push_back(preset.name);
        return all;
    }();
    return names;
}

void apply_preset(QuantizationSpec& spec, const std::function<bool(std::string_view key)>& is_set) {
    const auto preset = std::ranges::find(presets(), spec.preset, &Preset::name);
    if (preset == presets().end()) throw InternalError("no preset is called {}", spec.preset);
    const auto take = [&](auto& member, std::string_view key, const auto& value) {
        if (!is_set(key)) member = value;
    };
    take(spec.act_group_aware, "act_group_aware", preset->act_group_aware && !spec.desc_act);
    take(spec.static_groups, "static_groups", false);
    take(spec.scale_search, "scale_search", preset->scale_search);
    take(spec.signed_scales, "signed_scales", preset->signed_scales && spec.sym);
    take(spec.scale_rounding, "scale_rounding", preset->scale_rounding);
    take(spec.refit, "refit", preset->refit);
    take(spec.sweeps, "sweeps", preset->sweeps);
    const bool errors = spec.propagate == "quantized";
    take(spec.error_propagation_alpha, "error_propagation_alpha",
         errors ? preset->error_propagation_alpha : 0.0);
}

std::string contradiction_in(const QuantizationSpec& spec) {
    if (spec.act_group_aware && spec.desc_act)
        return "quantization.act_group_aware: orders columns inside their groups, quantization.desc_act "
               "across them: choose one";
    if (spec.signed_scales && !spec.sym)
        return "quantization.signed_scales: needs quantization.sym: true: an asymmetric grid has no longer "
               "side";
    if (spec.error_propagation_alpha > 0.0 && spec.propagate == "original")
        return "quantization.error_propagation_alpha: needs quantization.propagate: quantized: with original "
               "there is no error of earlier blocks to make up for";
    if (spec.lm_head_group_size && !spec.lm_head_bits)
        return "quantization.lm_head.group_size: needs quantization.lm_head.bits, without which lm_head is "
               "left "
               "as it is";
    return {};
}

}  // namespace quantmill
