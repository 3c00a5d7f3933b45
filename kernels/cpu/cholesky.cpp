#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/shape_check.h"

// LAPACK's Cholesky; every OpenBLAS build holds it, not every one installs a header for it.
extern "C" void spotrf_(const char* triangle, const blasint* order, float* matrix, const blasint* stride,
                        blasint* status);

namespace quantmill {
namespace {

constexpr std::int64_t kBlock = 128;  // columns of a panel
constexpr std::int64_t kRows = 256;   // rows of a panel that are one BLAS call

// H = R·Rᵀ by columns from the last to the first. Left-looking: a panel takes all earlier updates in one
// product with a long inner dimension, then is factored.
class ReverseCholesky {
public:
    ReverseCholesky(float* h, std::int64_t order)
        : h_(h), order_(order), flipped_(kBlock * kBlock), diagonal_(static_cast<std::size_t>(order)) {}

    // All threads of a parallel region call it together; false when a pivot is not positive.
    bool factor() {
        mirror();
        const std::int64_t blocks = (order_ + kBlock - 1) / kBlock;
        for (std::int64_t begin = (blocks - 1) * kBlock; begin >= 0; begin -= kBlock) {
            const std::int64_t end = std::min(begin + kBlock, order_);
            update(begin, end);
#pragma omp single
            positive_ = factor_diagonal(begin, end);
            if (!positive_) return false;
            solve(begin, end);
        }
        normalise();
        return true;
    }

private:
    float* at(std::int64_t row, std::int64_t column) { return h_ + row * order_ + column; }

    // Fills the upper triangle from the lower one.
    void mirror() {
        constexpr std::int64_t kTile = 32;
#pragma omp for schedule(dynamic, 4)
        for (std::int64_t rows = 0; rows < order_; rows += kTile) {
            for (std::int64_t columns = rows; columns < order_; columns += kTile) {
                const std::int64_t last_row = std::min(rows + kTile, order_);
                const std::int64_t last_column = std::min(columns + kTile, order_);
                for (std::int64_t i = rows; i < last_row; ++i) {
                    for (std::int64_t j = std::max(columns, i + 1); j < last_column; ++j) {
                        *at(i, j) = *at(j, i);
                    }
                }
            }
        }
    }

    // A[0:end, begin:end] −= R[0:end, end:] · R[begin:end, end:]ᵀ
    void update(std::int64_t begin, std::int64_t end) {
        if (end == order_) return;
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t row = 0; row < end; row += kRows) {
            sgemm(std::min(kRows, end - row), end - begin, order_ - end, -1.0F, {at(row, end), order_},
                  {at(begin, end), order_, true}, 1.0F, at(row, begin), order_);
        }
    }

    // The diagonal block, reversed in both directions, has an ordinary lower factor.
    bool factor_diagonal(std::int64_t begin, std::int64_t end) {
        const std::int64_t size = end - begin;
        const auto mirrored = [&](std::int64_t i, std::int64_t j) { return at(end - 1 - i, end - 1 - j); };
        for (std::int64_t i = 0; i < size; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) flipped_[i * size + j] = *mirrored(i, j);
        }
        const auto blas_size = static_cast<blasint>(size);
        blasint status = 0;
        spotrf_("U", &blas_size, flipped_.data(), &blas_size, &status);  // column-major: our lower one
        if (status != 0) return false;
        for (std::int64_t i = 0; i < size; ++i) {
            // Any NaN or infinity left of the pivot has reached it; OpenBLAS itself lets NaN pass.
            const float pivot = flipped_[i * size + i];
            if (!std::isfinite(pivot) || pivot <= 0.0F) return false;
            for (std::int64_t j = 0; j <= i; ++j) *mirrored(i, j) = flipped_[i * size + j];
            diagonal_[end - 1 - i] = pivot;
        }
        return true;
    }

    // R[0:begin, begin:end] = A[0:begin, begin:end] · R[begin:end, begin:end]⁻ᵀ
    void solve(std::int64_t begin, std::int64_t end) {
        const auto stride = static_cast<blasint>(order_);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t row = 0; row < begin; row += kRows) {
            cblas_strsm(CblasRowMajor, CblasRight, CblasUpper, CblasTrans, CblasNonUnit,
                        static_cast<blasint>(std::min(kRows, begin - row)), static_cast<blasint>(end - begin),
                        1.0F, at(begin, begin), stride, at(row, begin), stride);
        }
    }

    // R_ij -> R_ij / R_jj above the diagonal.
    void normalise() {
#pragma omp for schedule(dynamic, 16)
        for (std::int64_t i = 0; i < order_; ++i) {
            for (std::int64_t j = i + 1; j < order_; ++j) *at(i, j) /= diagonal_[j];
        }
    }

    float* h_;
    std::int64_t order_;
    std::vector<float> flipped_;   // the diagonal block in reverse order
    std::vector<float> diagonal_;  // R_jj
    bool positive_ = true;
};

}  // namespace

bool CpuBackend::reverse_cholesky(TensorView h) {
    const std::int64_t order = square_order(h, "reverse_cholesky");
    ReverseCholesky cholesky(h.data<float>(), order);
    bool positive = true;
#pragma omp parallel
    {
        const bool mine = cholesky.factor();
#pragma omp single
        positive = mine;
    }
    return positive;
}

}  // namespace quantmill
