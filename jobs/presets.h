#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "jobs/job_spec.h"

namespace quantmill {

// Names for quantization.preset, plainest first.
const std::vector<std::string>& preset_names();

// Gives every key that quantization.preset decides and that `is_set` ("scale_search") denies the value of the
// preset; one that the other keys leave no sense (signed scales of asymmetric grids) is switched off.
void apply_preset(QuantizationSpec& spec, const std::function<bool(std::string_view key)>& is_set);

// What two keys say against each other, or nothing: such a job is refused, and nothing is ignored.
std::string contradiction_in(const QuantizationSpec& spec);

}  // namespace quantmill
