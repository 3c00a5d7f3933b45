#include <algorithm>
#include <bit>
#include <cstdint>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/error.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

using cuda::kPropagateBlock;

constexpr std::int64_t kPanel = 1024;  // columns that meet the others in one product
constexpr std::int64_t kParts = 3;     // of a bf16 product that stands for one of fp32

const float* floats(const ConstTensorView& view) { return reinterpret_cast<const float*>(view.bytes()); }
float* floats(const TensorView& view) { return reinterpret_cast<float*>(view.bytes()); }
const std::int32_t* integers(const ConstTensorView& view) {
    return reinterpret_cast<const std::int32_t*>(view.bytes());
}

// With H = R·Rᵀ and U_ij = R_ij / R_jj, unit upper triangular, R = U·diag(r), so
// y·H⁻¹ = ((y·U⁻ᵀ) · diag(1 / r²)) · U⁻¹: the factor is used as reverse_cholesky leaves it.
//
// Both solves look right: a block of 128 columns is multiplied with the inverse of its diagonal block and
// taken from the other columns of its panel in fp32, then the panel from all columns that are left. That,
// and the product W·D, is nearly all of the work; beyond kExactColumns it runs on tensor cores with operands
// in two bf16 parts, a·b ≈ high·high + high·low + low·high, as the solve and the factor do. Every product's
// algorithm is pinned for any number of rows (cuda::Gemm), so rows do not feel each other.
class ErrorPropagation {
public:
    ErrorPropagation(CudaBackend& backend, cuda::Gemm& gemm, const float* factor, std::int64_t rows,
                     std::int64_t columns)
        : gemm_(gemm), stream_(backend.stream()), factor_(factor), rows_(rows), columns_(columns) {
        const std::int64_t blocks = (columns + kPropagateBlock - 1) / kPropagateBlock;
        inverses_ =
            backend.empty({blocks * kPropagateBlock, kPropagateBlock}, DType::f32, "inverses of blocks");
        cuda::invert_blocks(factor, columns, floats(inverses_.view()), stream_);
        if (exact()) return;
        left_ = backend.empty({rows, kParts * kPanel}, DType::bf16, "the left parts of a panel");
        right_ = backend.empty({columns, kParts * kPanel}, DType::bf16, "the right parts of a panel");
    }

    static std::size_t workspace(std::int64_t rows, std::int64_t columns) {
        const auto bytes = [](std::int64_t elements, DType type) {
            return static_cast<std::size_t>(elements) * size_of(type);
        };
        const std::size_t inverses = bytes((columns + kPropagateBlock) * kPropagateBlock, DType::f32);
        const std::size_t moved = bytes(rows * columns, DType::f32);
        if (columns <= cuda::kExactColumns) return inverses + moved;
        return inverses + moved + bytes((rows + columns) * kParts * kPanel, DType::bf16);
    }

    // out = weights · d.
    void multiply(const float* weights, const float* d, float* out) {
        for (std::int64_t k = 0; k < columns_; k += kPanel) {
            const std::int64_t depth = std::min(kPanel, columns_ - k);
            product({weights + k, d + k * columns_, false, depth, columns_, 1.0F, k == 0 ? 0.0F : 1.0F}, out);
        }
    }

    // out · Uᵀ = y; y is used up.
    void solve_transposed(float* y, float* out) {
        for (std::int64_t begin = (columns_ - 1) / kPanel * kPanel; begin >= 0; begin -= kPanel) {
            const std::int64_t end = std::min(begin + kPanel, columns_);
            for (std::int64_t block = (end - 1) / kPropagateBlock * kPropagateBlock; block >= begin;
                 block -= kPropagateBlock) {
                const std::int64_t stop = std::min(block + kPropagateBlock, end);
                apply_inverse(y, block, stop, true, out);
                exact_product({out + block, at(begin, block), true, stop - block, block - begin, -1.0F, 1.0F},
                              y + begin);
            }
            product({out + begin, at(0, begin), true, end - begin, begin, -1.0F, 1.0F}, y);
        }
    }

    // out · U = y; y is used up.
    void solve(float* y, float* out) {
        for (std::int64_t begin = 0; begin < columns_; begin += kPanel) {
            const std::int64_t end = std::min(begin + kPanel, columns_);
            for (std::int64_t block = begin; block < end; block += kPropagateBlock) {
                const std::int64_t stop = std::min(block + kPropagateBlock, end);
                apply_inverse(y, block, stop, false, out);
                exact_product({out + block, at(block, stop), false, stop - block, end - stop, -1.0F, 1.0F},
                              y + stop);
            }
            product({out + begin, at(begin, end), false, end - begin, columns_ - end, -1.0F, 1.0F}, y + end);
        }
    }

private:
    // out[rows, columns] = alpha · x[rows, depth] · y[depth, columns] + beta · out, all with rows of columns_
    // elements; transposed: y is stored [columns, depth].
    struct Step {
        const float* x;
        const float* y;
        bool transposed;
        std::int64_t depth, columns;
        float alpha, beta;
    };

    bool exact() const { return columns_ <= cuda::kExactColumns; }
    const float* at(std::int64_t row, std::int64_t column) const { return factor_ + row * columns_ + column; }

    void exact_product(const Step& step, float* out) {
        if (step.columns == 0) return;
        gemm_.run({.rows = rows_,
                   .columns = step.columns,
                   .depth = step.depth,
                   .ldx = columns_,
                   .ldy = columns_,
                   .ldd = columns_,
                   .y_by_columns = step.transposed,
                   .alpha = step.alpha,
                   .beta = step.beta,
                   .rows_vary = true},
                  {step.x, step.y, out, out}, stream_);
    }

    void product(const Step& step, float* out) {
        if (exact()) return exact_product(step, out);
        if (step.columns == 0) return;
        const std::int64_t depth = kParts * step.depth;
        const std::int64_t ldy = step.transposed ? depth : step.columns;
        std::byte* left = left_.view().bytes();
        std::byte* right = right_.view().bytes();
        cuda::split(step.x, rows_, step.depth, columns_, cuda::SplitOrder::high_high_low, step.depth, depth,
                    left, stream_);
        if (step.transposed) {
            cuda::split(step.y, step.columns, step.depth, columns_, cuda::SplitOrder::high_low_high,
                        step.depth, depth, right, stream_);
        } else {
            cuda::split(step.y, step.depth, step.columns, columns_, cuda::SplitOrder::high_low_high,
                        step.depth * step.columns, step.columns, right, stream_);
        }
        gemm_.run({.input = CUDA_R_16BF,
                   .rows = rows_,
                   .columns = step.columns,
                   .depth = depth,
                   .ldx = depth,
                   .ldy = ldy,
                   .ldd = columns_,
                   .y_by_columns = step.transposed,
                   .alpha = step.alpha,
                   .beta = step.beta,
                   .rows_vary = true},
                  {left, right, out, out}, stream_);
    }

    // out[:, block] = y[:, block] · U_bb⁻¹, or its transpose.
    void apply_inverse(const float* y, std::int64_t block, std::int64_t stop, bool transposed, float* out) {
        gemm_.run({.rows = rows_,
                   .columns = stop - block,
                   .depth = stop - block,
                   .ldx = columns_,
                   .ldy = kPropagateBlock,
                   .ldd = columns_,
                   .y_by_columns = transposed,
                   .rows_vary = true},
                  {y + block, floats(inverses_.view()) + block * kPropagateBlock, out + block, out + block},
                  stream_);
    }

    cuda::Gemm& gemm_;
    cudaStream_t stream_;
    const float* factor_;
    std::int64_t rows_, columns_;
    Tensor inverses_;      // [blocks · 128, 128]
    Tensor left_, right_;  // bf16 [R, parts · panel], [C, parts · panel] or [parts · panel, C]
};

}  // namespace

// The difference of two bf16 numbers is rounded to bf16 again, so that one product does. Both numbers came
// out of a rounding that may have moved them by 2⁻⁸ of themselves; the new one moves their difference by at
// most 2⁻⁸ of it, which is no more than what the two did, |x − x̃| <= |x| + |x̃|. And it is exact wherever the
// difference has at most 256 units of the smaller number's last place, as where one of two close numbers is
// in the binade of the other. X̃ is exact, products of bf16 are exact in fp32, so the sums are as good as a
// Hessian's. Subtracting two finished products XᵀX̃ − X̃ᵀX̃ instead would cancel the leading digits of fp32.
void CudaBackend::accumulate_cross(TensorView original, ConstTensorView x, TensorView d) {
    const std::int64_t order = square_order(d, "accumulate_cross");
    const std::int64_t tokens = x.shape().rank() == 2 ? x.extent(0) : 0;
    require_operands(is(x, DType::bf16, {tokens, order}) && is(original, DType::bf16, {tokens, order}),
                     "accumulate_cross", {original, x, d});
    if (tokens == 0) return;
    cuda::subtract(x.bytes(), tokens * order, original.bytes(), stream_);
    for (std::int64_t token = 0; token < tokens; token += micro_batch_tokens()) {
        const std::int64_t end = std::min(token + micro_batch_tokens(), tokens);
        gemm_->run({.input = CUDA_R_16BF,
                    .output = CUDA_R_32F,
                    .rows = order,
                    .columns = order,
                    .depth = end - token,
                    .ldx = order,
                    .ldy = order,
                    .ldd = order,
                    .x_by_depth = true,
                    .beta = 1.0F},
                   {original.rows(token, end).bytes(), x.rows(token, end).bytes(), d.bytes(), d.bytes()},
                   stream_);
    }
}

double CudaBackend::largest_fixed_point(ConstTensorView d, std::span<const std::int32_t> exponents) {
    const std::int64_t order = square_order(d, "largest_fixed_point");
    require_length(exponents.size(), order, "largest_fixed_point");
    const Tensor device_exponents = upload(exponents, "fixed-point exponents");
    Tensor largest = empty({1}, DType::i64, "largest value in fixed point");
    zero(largest);
    cuda::largest_fixed_point(floats(d), integers(device_exponents.view()), order, largest.view().bytes(),
                              stream_);
    return std::bit_cast<double>(download<std::int64_t>(largest).front());
}

void CudaBackend::add_fixed_point_full(ConstTensorView d, std::span<const std::int32_t> exponents,
                                       TensorView sum) {
    const std::int64_t order = square_order(d, "add_fixed_point_full");
    require_length(exponents.size(), order, "add_fixed_point_full");
    require_operands(is(sum, DType::i64, {order, order}), "add_fixed_point_full", {d, sum});
    const Tensor device_exponents = upload(exponents, "fixed-point exponents");
    Tensor misfits = empty({1}, DType::i32, "fixed-point misfits");
    zero(misfits);
    cuda::add_fixed_point_full(floats(d), integers(device_exponents.view()), order,
                               reinterpret_cast<std::int64_t*>(sum.bytes()),
                               reinterpret_cast<int*>(misfits.view().bytes()), stream_);
    if (download<std::int32_t>(misfits).front() != 0) {
        throw InternalError(
            "add_fixed_point_full: values are not finite or exceed the headroom of the fixed-point scales");
    }
}

void CudaBackend::from_fixed_point_full(ConstTensorView sum, std::span<const std::int32_t> exponents,
                                        double factor, TensorView d) {
    const std::int64_t order = square_order(d, "from_fixed_point_full");
    require_length(exponents.size(), order, "from_fixed_point_full");
    require_operands(is(sum, DType::i64, {order, order}), "from_fixed_point_full", {sum, d});
    const Tensor device_exponents = upload(exponents, "fixed-point exponents");
    cuda::from_fixed_point_full(reinterpret_cast<const std::int64_t*>(sum.bytes()),
                                integers(device_exponents.view()), factor, order, floats(d), stream_);
}

std::size_t CudaBackend::propagate_workspace(std::int64_t rows, std::int64_t columns) const {
    return ErrorPropagation::workspace(rows, columns);
}

void CudaBackend::propagate_error(ConstTensorView weights, ConstTensorView d, ConstTensorView factor,
                                  std::span<const std::int32_t> order, float alpha, TensorView target) {
    require_propagate_operands(weights, d, factor, order, target);
    if (weights.shape().count() == 0) return;
    const std::int64_t rows = weights.extent(0);
    const std::int64_t columns = weights.extent(1);
    ErrorPropagation propagation(*this, *gemm_, floats(factor), rows, columns);
    Tensor moved = empty(weights.shape(), DType::f32, "a propagated error");
    Tensor device_order;
    if (order.empty()) {
        propagation.multiply(floats(weights), floats(d), floats(moved.view()));
    } else {
        device_order = upload(order, "column order");
        propagation.multiply(floats(weights), floats(d), floats(target));
        cuda::permute_columns(target.bytes(), DType::f32, integers(device_order.view()), rows, columns,
                              moved.view().bytes(), stream_);
    }
    propagation.solve_transposed(floats(moved.view()), floats(target));
    cuda::divide_columns(floats(factor), rows, columns, floats(target), stream_);
    propagation.solve(floats(target), floats(moved.view()));
    cuda::add_propagated(floats(weights), floats(moved.view()),
                         order.empty() ? nullptr : integers(device_order.view()), rows, columns, alpha,
                         floats(target), stream_);
}

}  // namespace quantmill
