#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

using cuda::kCholeskyBlock;

// Columns of R that meet the rest of the matrix in one update.
constexpr std::int64_t kPanel = 1024;
// Columns of the triangle that one product of an update computes.
constexpr std::int64_t kBlockColumns = 2048;

constexpr std::int64_t kParts = 3;  // of a bf16 product that stands for one of fp32

// H = R·Rᵀ from the last columns to the first. The rows of Rᵀ replace the rows of H's lower triangle.
//
// Blocks of 128 rows are factored and applied in fp32. What they take from later blocks, nearly all of
// the work, runs on tensor cores: every element is split into two bf16 parts, a = high + low, and
// a·b ≈ high·high + high·low + low·high is one product with three times the depth and fp32 sums. What
// is left out is below 2⁻¹⁶ of a product (bench/RESULTS.md has the accuracy). Up to kExactColumns they are
// products in fp32 of the rows as they lie in H.
class ReverseCholesky {
public:
    ReverseCholesky(cuda::Gemm& gemm, cudaStream_t stream, float* h, std::int64_t order, void* left,
                    void* right, float* inverse, int* failed)
        : gemm_(gemm),
          stream_(stream),
          h_(h),
          order_(order),
          left_(static_cast<std::byte*>(left)),
          right_(static_cast<std::byte*>(right)),
          inverse_(inverse),
          failed_(failed) {}

    // bf16 elements of a column's parts in a panel.
    static constexpr std::int64_t kPanelParts = kParts * kPanel;

    void run() {
        for (std::int64_t begin = (order_ - 1) / kPanel * kPanel; begin >= 0; begin -= kPanel) {
            const std::int64_t end = std::min(begin + kPanel, order_);
            panel_ = {begin, end};
            const std::int64_t blocks = (end - begin + kCholeskyBlock - 1) / kCholeskyBlock;
            for (std::int64_t block = blocks - 1; block >= 0; --block) {
                const std::int64_t row = begin + block * kCholeskyBlock;
                const std::int64_t stop = std::min(row + kCholeskyBlock, end);
                subtract(row, stop, 0, stop, block + 1, blocks);
                factor(row, stop, block);
            }
            for (std::int64_t column = 0; column < begin; column += kBlockColumns) {
                subtract(column, begin, column, std::min(column + kBlockColumns, begin), 0, blocks);
            }
        }
        cuda::cholesky_finish(h_, order_, stream_);
    }

private:
    float* at(std::int64_t row, std::int64_t column) { return h_ + row * order_ + column; }

    // H[rows, columns] −= Σ_k R[rows, k] · R[columns, k]ᵀ over the panel's blocks [first, last).
    void subtract(std::int64_t row, std::int64_t row_end, std::int64_t column, std::int64_t column_end,
                  std::int64_t first, std::int64_t last) {
        if (first == last) return;
        if (left_ == nullptr) {
            const std::int64_t k = panel_.first + first * kCholeskyBlock;
            const std::int64_t k_end = std::min(panel_.first + last * kCholeskyBlock, panel_.second);
            return gemm_.run({.rows = row_end - row,
                              .columns = column_end - column,
                              .depth = k_end - k,
                              .ldx = order_,
                              .ldy = order_,
                              .ldd = order_,
                              .x_by_depth = true,
                              .alpha = -1.0F,
                              .beta = 1.0F},
                             {at(k, row), at(k, column), at(row, column), at(row, column)}, stream_);
        }
        const std::int64_t offset = first * kParts * kCholeskyBlock;
        gemm_.run(
            {.input = CUDA_R_16BF,
             .rows = row_end - row,
             .columns = column_end - column,
             .depth = (last - first) * kParts * kCholeskyBlock,
             .ldx = kPanelParts,
             .ldy = kPanelParts,
             .ldd = order_,
             .y_by_columns = true,
             .alpha = -1.0F,
             .beta = 1.0F},
            {parts(left_, row, offset), parts(right_, column, offset), at(row, column), at(row, column)},
            stream_);
    }

    // Rows [row, stop) of Rᵀ, the panel's block number `block`.
    void factor(std::int64_t row, std::int64_t stop, std::int64_t block) {
        const int size = static_cast<int>(stop - row);
        const std::int64_t offset = block * kParts * kCholeskyBlock;
        cuda::cholesky_block(at(row, row), size, order_, inverse_, failed_, stream_);
        const bool exact = left_ == nullptr;
        cuda::cholesky_panel(at(row, 0), inverse_, size, row, order_,
                             exact ? nullptr : parts(left_, 0, offset),
                             exact ? nullptr : parts(right_, 0, offset), kPanelParts, stream_);
    }

    static std::byte* parts(std::byte* matrix, std::int64_t row, std::int64_t offset) {
        return matrix + (row * kPanelParts + offset) * static_cast<std::int64_t>(size_of(DType::bf16));
    }

    cuda::Gemm& gemm_;
    cudaStream_t stream_;
    float* h_;
    std::int64_t order_;
    std::pair<std::int64_t, std::int64_t> panel_;  // its rows
    std::byte* left_;  // bf16 [order, blocks of the panel · (high, high, low)]; nullptr: products are in fp32
    std::byte* right_;  // bf16 [order, blocks of the panel · (high, low, high)]
    float* inverse_;
    int* failed_;
};

}  // namespace

std::size_t CudaBackend::factor_workspace(std::int64_t columns) const {
    if (columns <= cuda::kExactColumns) return 0;
    return 2 * static_cast<std::size_t>(columns * ReverseCholesky::kPanelParts) * size_of(DType::bf16);
}

bool CudaBackend::reverse_cholesky(TensorView h) {
    const std::int64_t order = square_order(h, "reverse_cholesky");
    if (order == 0) return true;
    const Shape parts{order, ReverseCholesky::kPanelParts};
    Tensor left;
    Tensor right;
    if (order > cuda::kExactColumns) {
        left = empty(parts, DType::bf16, "the left parts of a Cholesky panel");
        right = empty(parts, DType::bf16, "the right parts of a Cholesky panel");
    }
    Tensor inverse = empty({kCholeskyBlock, kCholeskyBlock}, DType::f32, "a Cholesky block's inverse");
    Tensor failed = empty({1}, DType::i32, "a Cholesky failure flag");
    zero(failed);
    ReverseCholesky(*gemm_, stream_, reinterpret_cast<float*>(h.bytes()), order, left.view().bytes(),
                    right.view().bytes(), reinterpret_cast<float*>(inverse.view().bytes()),
                    reinterpret_cast<int*>(failed.view().bytes()))
        .run();
    return download<std::int32_t>(failed).front() == 0;
}

}  // namespace quantmill
