#include <algorithm>
#include <cstdint>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/error.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

// Columns of the triangle that one product computes below the diagonal's squares, and its rows: narrower or
// taller ones run slower (bench/RESULTS.md).
constexpr std::int64_t kBlockColumns = 2048;
constexpr std::int64_t kPieceRows = 14336;
// The diagonal's squares are halved down to this order: what is above the diagonal is computed in vain.
constexpr std::int64_t kSmallestSquare = 512;

const float* floats(const ConstTensorView& view) { return reinterpret_cast<const float*>(view.bytes()); }
float* floats(const TensorView& view) { return reinterpret_cast<float*>(view.bytes()); }
// Column `column` of a bf16 matrix's first row.
const std::byte* at(const ConstTensorView& x, std::int64_t column) {
    return x.bytes() + column * static_cast<std::int64_t>(size_of(DType::bf16));
}
const std::int32_t* integers(const ConstTensorView& view) {
    return reinterpret_cast<const std::int32_t*>(view.bytes());
}

// Adds the lower triangle of xᵀ·x to h: squares on the diagonal, halved until little is above it, and tall
// products below them.
class Triangle {
public:
    Triangle(cuda::Gemm& gemm, cudaStream_t stream, ConstTensorView x, float* h)
        : gemm_(gemm), stream_(stream), x_(x), h_(h), order_(x.extent(1)) {}

    void add() {
        for (std::int64_t column = 0; column < order_; column += kBlockColumns) {
            for (std::int64_t row = column + kBlockColumns; row < order_; row += kPieceRows) {
                add({row, column, std::min(kPieceRows, order_ - row), kBlockColumns});
            }
        }
        for (std::int64_t size = kBlockColumns; size > kSmallestSquare; size /= 2) add_quarters(size);
        const std::int64_t rest = order_ % kSmallestSquare;
        add({0, 0, kSmallestSquare, kSmallestSquare, order_ / kSmallestSquare, kSmallestSquare});
        add({order_ - rest, order_ - rest, rest, rest});
    }

private:
    struct Piece {
        std::int64_t row, column, rows, columns;
        std::int64_t count = 1, step = 0;  // more of them, down the diagonal
    };

    // The lower left quarters of the diagonal's squares.
    void add_quarters(std::int64_t size) {
        const std::int64_t half = size / 2;
        const std::int64_t rest = order_ % size;
        add({half, 0, half, half, order_ / size, size});
        if (rest > half) add({order_ - rest + half, order_ - rest, rest - half, half});
    }

    void add(const Piece& piece) {
        if (piece.count == 0) return;
        float* d = h_ + piece.row * order_ + piece.column;
        gemm_.run({.input = CUDA_R_16BF,
                   .output = CUDA_R_32F,
                   .rows = piece.rows,
                   .columns = piece.columns,
                   .depth = x_.extent(0),
                   .ldx = order_,
                   .ldy = order_,
                   .ldd = order_,
                   .x_by_depth = true,
                   .count = piece.count,
                   .step_x = piece.step,
                   .step_y = piece.step,
                   .step_d = piece.step * (order_ + 1),
                   .beta = 1.0F},
                  {at(x_, piece.row), at(x_, piece.column), d, d}, stream_);
    }

    cuda::Gemm& gemm_;
    cudaStream_t stream_;
    ConstTensorView x_;
    float* h_;
    std::int64_t order_;
};

}  // namespace

void CudaBackend::accumulate_hessian(ConstTensorView x, TensorView h) {
    const std::int64_t order = square_order(h, "accumulate_hessian");
    const std::int64_t tokens = x.shape().rank() == 2 ? x.extent(0) : 0;
    require_operands(is(x, DType::bf16, {tokens, order}), "accumulate_hessian", {x, h});
    // The tensor cores' accumulators meet the fp32 master once a chunk.
    for (std::int64_t token = 0; token < tokens; token += micro_batch_tokens()) {
        Triangle(*gemm_, stream_, x.rows(token, std::min(token + micro_batch_tokens(), tokens)), floats(h))
            .add();
    }
}

std::vector<float> CudaBackend::read_diagonal(ConstTensorView h) {
    const std::int64_t order = square_order(h, "read_diagonal");
    Tensor diagonal = empty({order}, DType::f32, "a Hessian's diagonal");
    cuda::read_diagonal(floats(h), order, floats(diagonal.view()), stream_);
    return download<float>(diagonal);
}

void CudaBackend::write_diagonal(std::span<const float> values, TensorView h) {
    const std::int64_t order = square_order(h, "write_diagonal");
    require_length(values.size(), order, "write_diagonal");
    const Tensor diagonal = upload(values, "a Hessian's diagonal");
    cuda::write_diagonal(floats(diagonal.view()), order, floats(h), stream_);
}

void CudaBackend::add_fixed_point(ConstTensorView h, std::span<const std::int32_t> exponents,
                                  TensorView sum) {
    const std::int64_t order = square_order(h, "add_fixed_point");
    require_length(exponents.size(), order, "add_fixed_point");
    require_operands(is(sum, DType::i64, {order * (order + 1) / 2}), "add_fixed_point", {h, sum});
    const Tensor device_exponents = upload(exponents, "fixed-point exponents");
    Tensor misfits = empty({1}, DType::i32, "fixed-point misfits");
    zero(misfits);
    cuda::add_fixed_point(floats(h), integers(device_exponents.view()), order,
                          reinterpret_cast<std::int64_t*>(sum.bytes()),
                          reinterpret_cast<int*>(misfits.view().bytes()), stream_);
    if (download<std::int32_t>(misfits).front() != 0) {
        throw InternalError(
            "add_fixed_point: values of the Hessian are not finite or exceed the headroom "
            "of the fixed-point scales");
    }
}

void CudaBackend::from_fixed_point(ConstTensorView sum, std::span<const std::int32_t> exponents,
                                   double factor, TensorView h) {
    const std::int64_t order = square_order(h, "from_fixed_point");
    require_length(exponents.size(), order, "from_fixed_point");
    require_operands(is(sum, DType::i64, {order * (order + 1) / 2}), "from_fixed_point", {sum, h});
    const Tensor device_exponents = upload(exponents, "fixed-point exponents");
    cuda::from_fixed_point(reinterpret_cast<const std::int64_t*>(sum.bytes()),
                           integers(device_exponents.view()), factor, order, floats(h), stream_);
}

void CudaBackend::permute_symmetric(ConstTensorView source, std::span<const std::int32_t> order,
                                    TensorView h) {
    const std::int64_t n = square_order(h, "permute_symmetric");
    require_length(order.size(), n, "permute_symmetric");
    require_operands(is(source, DType::f32, {n, n}) && source.bytes() != h.bytes(), "permute_symmetric",
                     {source, h});
    const Tensor device_order = upload(order, "column order");
    cuda::permute_symmetric(floats(source), integers(device_order.view()), n, floats(h), stream_);
}

}  // namespace quantmill
