#pragma once

#include <initializer_list>
#include <string>
#include <string_view>

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

}  // namespace quantmill
