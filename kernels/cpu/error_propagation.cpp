#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

constexpr std::int64_t kColumns = 512;  // of the product that are one BLAS call

// With H = R·Rᵀ and U_ij = R_ij / R_jj, unit upper triangular, R = U·diag(r), so
// y·H⁻¹ = ((y·U⁻ᵀ) · diag(1 / r²)) · U⁻¹: the factor is used as reverse_cholesky leaves it.
class ErrorPropagation {
public:
    ErrorPropagation(const float* d, const float* factor, std::int64_t columns,
                     std::span<const std::int32_t> order, float alpha)
        : d_(d), factor_(factor), columns_(columns), order_(order.begin(), order.end()), alpha_(alpha) {
        if (!order_.empty()) return;
        order_.resize(static_cast<std::size_t>(columns));
        std::iota(order_.begin(), order_.end(), 0);
    }

    // Rows of one block, a thread's own; `y`, `ordered`: its scratch.
    void run(const float* weights, std::int64_t rows, std::vector<float>& y, std::vector<float>& ordered,
             float* target) const {
        for (std::int64_t j = 0; j < columns_; j += kColumns) {
            sgemm(rows, std::min(kColumns, columns_ - j), columns_, 1.0F, {weights, columns_},
                  {d_ + j, columns_}, 0.0F, y.data() + j, columns_);
        }
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t j = 0; j < columns_; ++j)
                ordered[r * columns_ + j] = y[r * columns_ + order_[j]];
        }
        solve(CblasTrans, rows, ordered.data());
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t j = 0; j < columns_; ++j) {
                const float root = factor_[j * columns_ + j];
                ordered[r * columns_ + j] /= root * root;
            }
        }
        solve(CblasNoTrans, rows, ordered.data());
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t j = 0; j < columns_; ++j) {
                const std::int64_t at = r * columns_ + order_[j];
                target[at] = weights[at] + alpha_ * ordered[r * columns_ + j];
            }
        }
    }

private:
    void solve(CBLAS_TRANSPOSE transposition, std::int64_t rows, float* y) const {
        const auto stride = static_cast<blasint>(columns_);
        cblas_strsm(CblasRowMajor, CblasRight, CblasUpper, transposition, CblasUnit,
                    static_cast<blasint>(rows), stride, 1.0F, factor_, stride, y, stride);
    }

    const float* d_;
    const float* factor_;
    std::int64_t columns_;
    std::vector<std::int32_t> order_;
    float alpha_;
};

}  // namespace

std::size_t CpuBackend::propagate_workspace(std::int64_t, std::int64_t columns) const {
    return static_cast<std::size_t>(2 * threads() * kSolveRowBlock * columns) * sizeof(float);
}

void CpuBackend::propagate_error(ConstTensorView weights, ConstTensorView d, ConstTensorView factor,
                                 std::span<const std::int32_t> order, float alpha, TensorView target) {
    require_propagate_operands(weights, d, factor, order, target);
    const std::int64_t rows = weights.extent(0);
    const std::int64_t columns = weights.extent(1);
    const ErrorPropagation propagation(d.data<float>(), factor.data<float>(), columns, order, alpha);
    const auto* weight_data = weights.data<float>();
    auto* target_data = target.data<float>();

#pragma omp parallel
    {
        std::vector<float> y(static_cast<std::size_t>(kSolveRowBlock * columns));
        std::vector<float> ordered(y.size());
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t row = 0; row < rows; row += kSolveRowBlock) {
            propagation.run(weight_data + row * columns, std::min(kSolveRowBlock, rows - row), y, ordered,
                            target_data + row * columns);
        }
    }
}

}  // namespace quantmill
