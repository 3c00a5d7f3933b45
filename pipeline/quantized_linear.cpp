#include "pipeline/quantized_linear.h"

namespace quantmill {

QuantizedLinear::QuantizedLinear(Backend& backend, std::int64_t rows, std::int64_t columns,
                                 const QuantizationGrid& grid_)
    : grid(grid_),
      codes(backend, {rows, columns}, DType::u8, "codes of a linear"),
      scales(backend, {rows, grid_.groups(columns)}, DType::f16, "scales of a linear"),
      zeros(backend, {rows, grid_.groups(columns)}, DType::u8, "zeros of a linear"),
      g_idx(static_cast<std::size_t>(columns)) {
    for (std::size_t c = 0; c < g_idx.size(); ++c) {
        g_idx[c] = static_cast<std::int32_t>(static_cast<std::int64_t>(c) / grid.group_size);
    }
}

QuantizedViews QuantizedLinear::rows(std::int64_t begin, std::int64_t end) {
    return {codes.view().rows(begin, end), scales.view().rows(begin, end), zeros.view().rows(begin, end)};
}

ConstQuantizedViews QuantizedLinear::rows(std::int64_t begin, std::int64_t end) const {
    return {codes.view().rows(begin, end), scales.view().rows(begin, end), zeros.view().rows(begin, end)};
}

Tensor forward_weights(Backend& backend, const QuantizedLinear& quantized, std::int64_t begin,
                       std::int64_t end) {
    Tensor weights =
        backend.empty({end - begin, quantized.columns()}, backend.activation_dtype(), "quantized weights");
    backend.dequantize(quantized.rows(begin, end), quantized.g_idx, weights);
    return weights;
}

}  // namespace quantmill
