#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace quantmill {

// A quantized weight [R, C]: weight[r, c] = scales[r, g] · (codes[r, c] − zeros[r, g]) with g = g_idx[c].
// How it lies in a file is a codec's business (gptq_format.h).
struct QuantizedLinear {
    QuantizationGrid grid;
    Tensor codes;                     // u8  [R, C]
    Tensor scales;                    // f16 [R, G]
    Tensor zeros;                     // u8  [R, G]
    std::vector<std::int32_t> g_idx;  // [C]

    QuantizedLinear(Backend& backend, std::int64_t rows, std::int64_t columns, const QuantizationGrid& grid);
    std::int64_t rows() const { return codes.shape()[0]; }
    std::int64_t columns() const { return codes.shape()[1]; }
    QuantizedViews rows(std::int64_t begin, std::int64_t end);
    ConstQuantizedViews rows(std::int64_t begin, std::int64_t end) const;
};

// Rows [begin, end) as the forward pass multiplies with them, in the activation dtype.
Tensor forward_weights(Backend& backend, const QuantizedLinear& quantized, std::int64_t begin,
                       std::int64_t end);

}  // namespace quantmill
