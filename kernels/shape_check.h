#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "kernels/backend.h"
#include "kernels/error.h"
#include "kernels/tensor.h"

namespace quantmill {

// Throws InternalError naming the operation and its operands' types and shapes unless they fit.
inline void require_operands(bool fit, std::string_view operation,
                             std::initializer_list<ConstTensorView> operands) {
    if (fit) return;
    std::string list;
    for (const ConstTensorView& operand : operands) {
        if (!list.empty()) list += ", ";
        list += std::string(name_of(operand.dtype())) + to_string(operand.shape());
    }
    throw InternalError("{}: operands do not fit together: {}", operation, list);
}

// Whether a view has this type and exactly these extents.
inline bool is(const ConstTensorView& view, DType dtype, const Shape& shape) {
    return view.dtype() == dtype && view.shape() == shape;
}

// The order of a square matrix; throws unless h is f32 [C, C].
inline std::int64_t square_order(const ConstTensorView& h, std::string_view operation) {
    const bool square = h.shape().rank() == 2 && h.extent(0) == h.extent(1);
    require_operands(square && h.dtype() == DType::f32, operation, {h});
    return h.extent(0);
}

inline void require_length(std::size_t length, std::int64_t order, std::string_view operation) {
    if (static_cast<std::int64_t>(length) != order) {
        throw InternalError("{}: {} values for a matrix of order {}", operation, length, order);
    }
}

inline bool grid_fits(const QuantizationGrid& grid) {
    return grid.group_size >= 1 && grid.bits >= 2 && grid.bits <= 8 && (grid.sym || !grid.signed_scales);
}

inline bool scales_fit(const ConstTensorView& weights, const QuantizationGrid& grid,
                       const QuantizedViews& out) {
    if (weights.shape().rank() != 2 || !grid_fits(grid)) return false;
    const Shape shape{weights.extent(0), grid.groups(weights.extent(1))};
    return weights.dtype() == DType::f32 && is(out.scales, DType::f16, shape) &&
           is(out.zeros, DType::u8, shape);
}

inline void require_solve_operands(const ConstTensorView& weights, const ConstTensorView& factor,
                                   const QuantizationGrid& grid, const QuantizedViews& out,
                                   const TensorView& loss) {
    const bool possible = scales_fit(weights, grid, out);
    const std::int64_t rows = possible ? weights.extent(0) : 0;
    const std::int64_t columns = possible ? weights.extent(1) : 0;
    require_operands(possible && is(factor, DType::f32, {columns, columns}) &&
                         is(out.codes, DType::u8, {rows, columns}) && is(loss, DType::f32, {rows}),
                     "gptq_solve", {weights, factor, out.codes, out.scales, out.zeros, loss});
}

// Throws unless there is a group for each of the columns.
inline void require_group_index(std::span<const std::int32_t> index, const QuantizationGrid& grid,
                                std::int64_t columns) {
    require_length(index.size(), columns, "gptq_solve_static");
    for (const std::int32_t group : index) {
        if (group >= 0 && group < grid.groups(columns)) continue;
        throw InternalError("gptq_solve_static: group {} of {}", group, grid.groups(columns));
    }
}

inline void require_grid_operands(const ConstTensorView& weights, std::span<const float> importance,
                                  const QuantizationGrid& grid, const QuantizedViews& out) {
    require_operands(scales_fit(weights, grid, out), "choose_grids", {weights, out.scales, out.zeros});
    if (!importance.empty()) require_length(importance.size(), weights.extent(1), "choose_grids");
}

// Of the operations that work on a quantized linear: hessian f32 [C, C].
inline void require_refine_operands(const ConstTensorView& weights, const ConstTensorView& hessian,
                                    const QuantizationGrid& grid, const QuantizedViews& quantized,
                                    std::string_view operation) {
    const bool possible = weights.shape().rank() == 2 && grid.group_size >= 1;
    const std::int64_t rows = possible ? weights.extent(0) : 0;
    const std::int64_t columns = possible ? weights.extent(1) : 0;
    const std::int64_t groups = possible ? grid.groups(columns) : 0;
    require_operands(possible && weights.dtype() == DType::f32 &&
                         is(hessian, DType::f32, {columns, columns}) &&
                         is(quantized.codes, DType::u8, {rows, columns}) &&
                         is(quantized.scales, DType::f16, {rows, groups}) &&
                         is(quantized.zeros, DType::u8, {rows, groups}),
                     operation, {weights, hessian, quantized.codes, quantized.scales, quantized.zeros});
}

inline void require_propagate_operands(const ConstTensorView& weights, const ConstTensorView& d,
                                       const ConstTensorView& factor, std::span<const std::int32_t> order,
                                       const TensorView& target) {
    const bool matrix = weights.shape().rank() == 2;
    const std::int64_t rows = matrix ? weights.extent(0) : 0;
    const std::int64_t columns = matrix ? weights.extent(1) : 0;
    const Shape square{columns, columns};
    require_operands(matrix && is(weights, DType::f32, {rows, columns}) && is(d, DType::f32, square) &&
                         is(factor, DType::f32, square) && is(target, DType::f32, {rows, columns}) &&
                         (order.empty() || static_cast<std::int64_t>(order.size()) == columns),
                     "propagate_error", {weights, d, factor, target});
}

inline constexpr std::int64_t kPackedRun = 32;  // codes of one row that fill `bits` whole words

// Throws unless codes are u8 [R, C], C a multiple of 32, and words their packed form.
inline void require_packing(const ConstTensorView& codes, int bits, const ConstTensorView& words,
                            std::string_view operation) {
    const bool fit = bits >= 1 && bits <= 8 && codes.dtype() == DType::u8 && codes.shape().rank() == 2 &&
                     codes.extent(1) % kPackedRun == 0 &&
                     is(words, DType::i32, {codes.extent(1) / kPackedRun * bits, codes.extent(0)});
    require_operands(fit, operation, {codes, words});
}

}  // namespace quantmill
