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

HostBuffer::HostBuffer(Backend& backend, std::size_t bytes, const std::string& what)
    : backend_(&backend), data_(static_cast<std::byte*>(backend.allocate_host(bytes, what))), size_(bytes) {}

HostBuffer::~HostBuffer() {
    if (data_ != nullptr) backend_->deallocate_host(data_, size_);
}

HostBuffer::HostBuffer(HostBuffer&& other) noexcept
    : backend_(other.backend_), data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}

HostBuffer& HostBuffer::operator=(HostBuffer&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

}  // namespace quantmill
