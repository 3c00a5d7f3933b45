#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "kernels/dtype.h"
#include "kernels/error.h"

namespace quantmill {

class Backend;

// Up to four extents, outermost first.
class Shape {
public:
    Shape() = default;
    Shape(std::initializer_list<std::int64_t> extents) {
        if (extents.size() > extents_.size()) throw InternalError("a tensor has at most 4 dimensions");
        for (const std::int64_t extent : extents) extents_.at(rank_++) = extent;
    }
    std::size_t rank() const { return rank_; }
    std::int64_t operator[](std::size_t axis) const { return extents_.at(axis); }
    std::int64_t count() const {
        std::int64_t product = 1;
        for (std::size_t axis = 0; axis < rank_; ++axis) product *= extents_.at(axis);
        return product;
    }
    void set(std::size_t axis, std::int64_t extent) { extents_.at(axis) = extent; }
    friend bool operator==(const Shape&, const Shape&) = default;

private:
    std::array<std::int64_t, 4> extents_{};
    std::size_t rank_ = 0;
};

std::string to_string(const Shape& shape);  // "[960, 576]"

// A contiguous row-major piece of a backend's memory; refers, never owns. The bytes live on the
// backend's device: only host backends may dereference data().
template <class Byte>
class BasicView {
public:
    BasicView() = default;
    BasicView(Byte* data, DType dtype, Shape shape, Backend* backend)
        : data_(data), dtype_(dtype), shape_(shape), backend_(backend) {}
    template <class Other>
        requires(std::is_const_v<Byte> && !std::is_const_v<Other>)
    BasicView(const BasicView<Other>& other)  // NOLINT(google-explicit-constructor): like T* to const T*
        : data_(other.bytes()), dtype_(other.dtype()), shape_(other.shape()), backend_(other.backend()) {}

    Byte* bytes() const { return data_; }
    DType dtype() const { return dtype_; }
    const Shape& shape() const { return shape_; }
    std::int64_t extent(std::size_t axis) const { return shape_[axis]; }
    Backend* backend() const { return backend_; }
    std::size_t size_bytes() const { return static_cast<std::size_t>(shape_.count()) * size_of(dtype_); }
    bool empty() const { return data_ == nullptr || shape_.count() == 0; }

    // The elements, for a host backend; throws InternalError when T is not the dtype.
    template <class T>
    auto data() const {
        if (dtype_of<T> != dtype_) {
            throw InternalError("tensor {} holds {}, not {}", to_string(shape_), name_of(dtype_),
                                name_of(dtype_of<T>));
        }
        using Element = std::conditional_t<std::is_const_v<Byte>, const T, T>;
        return reinterpret_cast<Element*>(data_);
    }

    // Rows [begin, end) along the first axis.
    BasicView rows(std::int64_t begin, std::int64_t end) const {
        if (begin < 0 || begin > end || end > shape_[0]) {
            throw InternalError("rows [{}, {}) of tensor {}", begin, end, to_string(shape_));
        }
        Shape piece = shape_;
        piece.set(0, end - begin);
        const std::int64_t row = shape_[0] == 0 ? 0 : shape_.count() / shape_[0];
        return {data_ + static_cast<std::size_t>(begin * row) * size_of(dtype_), dtype_, piece, backend_};
    }

    BasicView reshaped(Shape shape) const {
        if (shape.count() != shape_.count()) {
            throw InternalError("cannot view {} as {}", to_string(shape_), to_string(shape));
        }
        return {data_, dtype_, shape, backend_};
    }

    // The first shape.count() elements as a tensor of that shape: scratch buffers are sized once.
    BasicView leading(Shape shape) const {
        if (shape.count() > shape_.count()) {
            throw InternalError("no room for {} in {}", to_string(shape), to_string(shape_));
        }
        return {data_, dtype_, shape, backend_};
    }

private:
    Byte* data_ = nullptr;
    DType dtype_ = DType::u8;
    Shape shape_;
    Backend* backend_ = nullptr;
};

using TensorView = BasicView<std::byte>;
using ConstTensorView = BasicView<const std::byte>;

// Owns memory of a backend; made by Backend::empty. Move only.
class Tensor {
public:
    Tensor() = default;
    Tensor(Backend& backend, Shape shape, DType dtype, const std::string& what);
    ~Tensor();
    Tensor(Tensor&& other) noexcept;
    Tensor& operator=(Tensor&& other) noexcept;
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;

    TensorView view() { return view_; }
    ConstTensorView view() const { return view_; }
    operator TensorView() { return view_; }             // NOLINT(google-explicit-constructor)
    operator ConstTensorView() const { return view_; }  // NOLINT(google-explicit-constructor)
    const Shape& shape() const { return view_.shape(); }
    bool empty() const { return view_.empty(); }

private:
    TensorView view_;
};

}  // namespace quantmill
