#pragma once

#include "jobs/job_spec.h"
#include "pipeline/gptq_solver.h"

namespace quantmill {

// Hessians of less than a sixteenth of full rank: correlations seen in so few tokens are chance.
inline constexpr double kFewTokens = 1.0 / 16.0;

// What a job says about quantization, as the solver takes it. `bf16_model`: of the checkpoint's weights.
inline GptqOptions gptq_options(const QuantizationSpec& spec, bool bf16_model) {
    GptqOptions options;
    options.grid = {
        .bits = spec.bits,
        .group_size = spec.group_size,
        .sym = spec.sym,
        .search = spec.scale_search == "mse"       ? ScaleSearch::mse
                  : spec.scale_search == "hessian" ? ScaleSearch::hessian
                                                   : ScaleSearch::minmax,
        .signed_scales = spec.signed_scales,
        .bf16_scales = spec.scale_rounding == "bf16" || (spec.scale_rounding == "auto" && bf16_model)};
    options.desc_act = spec.desc_act;
    options.act_group_aware = spec.act_group_aware;
    options.static_groups = spec.static_groups;
    options.refit = spec.refit;
    options.sweeps = spec.sweeps;
    options.error_propagation_alpha = spec.error_propagation_alpha;
    options.damp_percent = spec.damp_percent.value_or(options.damp_percent);
    options.auto_damping = !spec.damp_percent;
    options.damp_auto_increment = spec.damp_auto_increment;
    options.few_tokens = kFewTokens;
    return options;
}

}  // namespace quantmill
