#include "kernels/tensor.h"

#include <utility>

#include "kernels/backend.h"

namespace quantmill {

std::string to_string(const Shape& shape) {
    std::string text = "[";
    for (std::size_t axis = 0; axis < shape.rank(); ++axis) {
        if (axis > 0) text += ", ";
        text += std::to_string(shape[axis]);
    }
    return text + "]";
}

Tensor::Tensor(Backend& backend, Shape shape, DType dtype, const std::string& what)
    : view_(static_cast<std::byte*>(
                backend.allocate(static_cast<std::size_t>(shape.count()) * size_of(dtype), what)),
            dtype, shape, &backend) {}

Tensor::~Tensor() {
    if (view_.bytes() != nullptr) view_.backend()->deallocate(view_.bytes());
}

Tensor::Tensor(Tensor&& other) noexcept : view_(std::exchange(other.view_, {})) {}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
    std::swap(view_, other.view_);
    return *this;
}

}  // namespace quantmill
