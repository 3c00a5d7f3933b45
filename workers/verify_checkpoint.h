#pragma once

#include "pipeline/checkpoint_reader.h"

namespace quantmill {

// Checks every tensor that config.json asks for: there, of its shape and dtype, floats finite; of a GPTQ
// checkpoint also that scales, zeros and g_idx are those of its scheme. Tensors beside the model's are let
// be when they are finite. Reads all but the codes. Throws BadInput.
void verify_checkpoint(const CheckpointReader& reader);

}  // namespace quantmill
