#pragma once

#include "jobs/job_spec.h"
#include "pipeline/gptq_solver.h"

namespace quantmill {

// What a job says about quantization, as the solver takes it.
inline GptqOptions gptq_options(const QuantizationSpec& spec) {
    return {
        {spec.bits, spec.group_size, spec.sym}, spec.desc_act, spec.damp_percent, spec.damp_auto_increment};
}

}  // namespace quantmill
