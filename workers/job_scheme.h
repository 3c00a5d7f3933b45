#pragma once

#include "jobs/job_spec.h"
#include "pipeline/quantization_scheme.h"

namespace quantmill {

// What becomes of each linear of a model by quantization.bits, …, .lm_head and .overrides. Throws BadInput,
// with the rule's place, for one that decides about no linear, or about some linears of a LinearGroup only.
QuantizationScheme scheme_of_job(const JobSpec& spec, const ModelGraph& graph, bool bf16_model);

}  // namespace quantmill
