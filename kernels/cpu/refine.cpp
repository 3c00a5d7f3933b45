#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/grid.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

constexpr std::int64_t kRows = kSolveRowBlock;  // rows of a block, the lanes of every loop
constexpr std::int64_t kBlock = 128;            // columns whose gradient comes from one product

struct Problem {
    const float* weights;  // [R, C]
    const float* hessian;  // [C, C]
    std::int64_t rows;     // R
    std::int64_t columns;  // C
    QuantizationGrid grid;
    const std::uint8_t* codes;  // [R, C]
    const Half* scales;         // [R, G]
    const std::uint8_t* zeros;  // [R, G]

    std::int64_t groups() const { return grid.groups(columns); }
};

// What is added to a scale: it keeps its sign, and is as the file stores it.
double storable_change(float scale, double change, const QuantizationGrid& grid) {
    const double wanted = double{scale} + change;
    if (!std::isfinite(wanted) || (wanted > 0.0) != (scale > 0.0F)) return 0.0;
    const auto size = to_float(storable_scale(static_cast<float>(std::abs(wanted)), grid.bf16_scales));
    return double{std::copysign(size, scale)} - double{scale};
}

// Solves a · x = b for a symmetric matrix [n, n] that may be singular where all steps of a group are zero.
std::vector<double> solve_positive(std::vector<double> a, std::vector<double> b) {
    const auto n = static_cast<std::ptrdiff_t>(b.size());
    double largest = 0.0;
    for (std::ptrdiff_t i = 0; i < n; ++i) largest = std::max(largest, a[i * n + i]);
    for (std::ptrdiff_t i = 0; i < n; ++i) a[i * n + i] += 1e-9 * largest + 1e-300;
    for (std::ptrdiff_t j = 0; j < n; ++j) {  // a = L·Lᵀ, L in the lower triangle
        for (std::ptrdiff_t k = 0; k < j; ++k) {
            for (std::ptrdiff_t i = j; i < n; ++i) a[i * n + j] -= a[i * n + k] * a[j * n + k];
        }
        const double root = std::sqrt(std::max(a[j * n + j], 1e-300));
        for (std::ptrdiff_t i = j; i < n; ++i) a[i * n + j] /= root;
    }
    for (std::ptrdiff_t i = 0; i < n; ++i) {
        for (std::ptrdiff_t k = 0; k < i; ++k) b[i] -= a[i * n + k] * b[k];
        b[i] /= a[i * n + i];
    }
    for (std::ptrdiff_t i = n - 1; i >= 0; --i) {
        for (std::ptrdiff_t k = i + 1; k < n; ++k) b[i] -= a[k * n + i] * b[k];
        b[i] /= a[i * n + i];
    }
    return b;
}

// d·a·dᵀ − 2·d·b: what the change d adds to the loss.
double added_loss(const std::vector<double>& a, const std::vector<double>& b, const std::vector<double>& d) {
    double sum = 0.0;
    for (std::size_t i = 0; i < d.size(); ++i) {
        double product = 0.0;
        for (std::size_t j = 0; j < d.size(); ++j) product += a[i * d.size() + j] * d[j];
        sum += d[i] * (product - 2.0 * b[i]);
    }
    return sum;
}

// Up to 64 rows, transposed to [column][row] so that rows are the lanes; lanes past the last row are zero, so
// every block runs the same instructions.
class RowBlock {
public:
    RowBlock(const Problem& problem, std::int64_t first_row)
        : p_(problem), row_(first_row), rows_(std::min(kRows, problem.rows - first_row)) {
        const auto elements = static_cast<std::size_t>(p_.columns * kRows);
        weights_.resize(elements);
        steps_.resize(elements);
        errors_.resize(elements);
        scales_.resize(static_cast<std::size_t>(p_.groups() * kRows));
        for (std::int64_t r = 0; r < rows_; ++r) load_row(r);
    }

    void losses(float* out) const {
        std::vector<float> products(static_cast<std::size_t>(kBlock * kRows));
        double sums[kRows] = {};
        for (std::int64_t begin = 0; begin < p_.columns; begin += kBlock) {
            const std::int64_t end = std::min(begin + kBlock, p_.columns);
            multiply(begin, end, errors_.data(), products.data());
            for (std::int64_t i = 0; i < (end - begin) * kRows; ++i) {
                sums[i % kRows] += double{errors_[begin * kRows + i]} * double{products[i]};
            }
        }
        for (std::int64_t r = 0; r < rows_; ++r) out[row_ + r] = static_cast<float>(std::max(sums[r], 0.0));
    }

    void sweep(std::uint8_t* codes) {
        std::vector<float> gradients(static_cast<std::size_t>(kBlock * kRows));
        for (std::int64_t begin = 0; begin < p_.columns; begin += kBlock) {
            const std::int64_t end = std::min(begin + kBlock, p_.columns);
            multiply(begin, end, errors_.data(), gradients.data());
            for (std::int64_t j = begin; j < end; ++j) move_column(j, end, &gradients[(j - begin) * kRows]);
        }
        for (std::int64_t r = 0; r < rows_; ++r) store_codes(r, codes);
    }

    void refit(Half* scales) {
        for (std::int64_t first = 0; first < p_.groups(); first += kRefitWindow) {
            refit_window(first, std::min(first + kRefitWindow, p_.groups()));
        }
        for (std::int64_t r = 0; r < rows_; ++r) {
            for (std::int64_t g = 0; g < p_.groups(); ++g) {
                scales[(row_ + r) * p_.groups() + g] = to_half(scales_[g * kRows + r]);
            }
        }
    }

private:
    void load_row(std::int64_t r) {
        const std::int64_t row = row_ + r;
        for (std::int64_t g = 0; g < p_.groups(); ++g) {
            scales_[g * kRows + r] = to_float(p_.scales[row * p_.groups() + g]);
        }
        for (std::int64_t c = 0; c < p_.columns; ++c) {
            const std::int64_t group = c / p_.grid.group_size;
            const std::int64_t lane = c * kRows + r;
            weights_[lane] = p_.weights[row * p_.columns + c];
            steps_[lane] =
                static_cast<float>(p_.codes[row * p_.columns + c]) - static_cast<float>(zero(r, group));
            errors_[lane] = weights_[lane] - scales_[group * kRows + r] * steps_[lane];
        }
    }

    int zero(std::int64_t r, std::int64_t group) const {
        return r < rows_ ? p_.zeros[(row_ + r) * p_.groups() + group] : 0;
    }

    void store_codes(std::int64_t r, std::uint8_t* codes) const {
        for (std::int64_t c = 0; c < p_.columns; ++c) {
            const int code = static_cast<int>(steps_[c * kRows + r]) + zero(r, c / p_.grid.group_size);
            codes[(row_ + r) * p_.columns + c] = static_cast<std::uint8_t>(code);
        }
    }

    // out[j] = Σ_i H_ji · x[i] for j in [begin, end); x [C][64].
    void multiply(std::int64_t begin, std::int64_t end, const float* x, float* out) const {
        sgemm(end - begin, kRows, p_.columns, 1.0F, {p_.hessian + begin * p_.columns, p_.columns}, {x, kRows},
              0.0F, out, kRows);
    }

    // The least of the parabola (e_j)² H_jj + 2 e_j Σ_{i≠j} e_i H_ij; `gradients`: (e H)_j of columns j to
    // end.
    void move_column(std::int64_t j, std::int64_t end, float* gradients) {
        const float* row = p_.hessian + j * p_.columns;
        const std::int64_t group = j / p_.grid.group_size;
        const auto max_code = static_cast<float>(p_.grid.max_code());
        float* errors = &errors_[j * kRows];
        float moves[kRows] = {};
        for (std::int64_t r = 0; r < rows_; ++r) {
            const float weight = weights_[j * kRows + r];
            const float scale = scales_[group * kRows + r];
            const auto offset = static_cast<float>(zero(r, group));
            const float target = weight + (gradients[r] - errors[r] * row[j]) / row[j];
            const float step = quantize(target, scale, offset, max_code) - offset;
            steps_[j * kRows + r] = step;
            const float error = weight - scale * step;
            moves[r] = error - errors[r];
            errors[r] = error;
        }
        for (std::int64_t i = j + 1; i < end; ++i) {
            float* later = gradients + (i - j) * kRows;
            for (std::int64_t r = 0; r < kRows; ++r) later[r] += moves[r] * row[i];
        }
    }

    // With E = W − Q and d the changes of the scales of groups [first, last), the loss changes by
    // d A dᵀ − 2 d b, A_gh = z_g H_gh z_hᵀ, b_g = z_g (H eᵀ)_g, z the steps.
    void refit_window(std::int64_t first, std::int64_t last) {
        const std::int64_t count = last - first;
        const std::int64_t begin = first * p_.grid.group_size;
        const std::int64_t end = std::min(last * p_.grid.group_size, p_.columns);
        std::vector<double> a(static_cast<std::size_t>(count * count * kRows));
        std::vector<double> b(static_cast<std::size_t>(count * kRows));
        std::vector<float> products(static_cast<std::size_t>((end - begin) * kRows));
        multiply(begin, end, errors_.data(), products.data());
        dot_groups(begin, end, products.data(), b.data());
        for (std::int64_t h = 0; h < count; ++h) {
            const std::int64_t from = begin + h * p_.grid.group_size;
            const std::int64_t width = std::min(p_.grid.group_size, end - from);
            sgemm(end - begin, kRows, width, 1.0F, {p_.hessian + begin * p_.columns + from, p_.columns},
                  {&steps_[from * kRows], kRows}, 0.0F, products.data(), kRows);
            dot_groups(begin, end, products.data(), &a[h * count * kRows]);
        }
        for (std::int64_t r = 0; r < rows_; ++r) move_scales(first, count, r, a, b);
        for (std::int64_t c = begin; c < end; ++c) {
            for (std::int64_t r = 0; r < rows_; ++r) {
                const std::int64_t lane = c * kRows + r;
                errors_[lane] = weights_[lane] - scales_[c / p_.grid.group_size * kRows + r] * steps_[lane];
            }
        }
    }

    // out[g] = Σ_{j in group g} steps[j] · products[j], groups of columns [begin, end).
    void dot_groups(std::int64_t begin, std::int64_t end, const float* products, double* out) const {
        for (std::int64_t c = begin; c < end; ++c) {
            double* sums = out + (c - begin) / p_.grid.group_size * kRows;
            for (std::int64_t r = 0; r < kRows; ++r) {
                sums[r] += double{steps_[c * kRows + r]} * double{products[(c - begin) * kRows + r]};
            }
        }
    }

    void move_scales(std::int64_t first, std::int64_t count, std::int64_t r, const std::vector<double>& a,
                     const std::vector<double>& b) {
        std::vector<double> matrix(static_cast<std::size_t>(count * count));
        std::vector<double> right(static_cast<std::size_t>(count));
        for (std::int64_t i = 0; i < count * count; ++i) matrix[i] = a[i * kRows + r];
        for (std::int64_t i = 0; i < count; ++i) right[i] = b[i * kRows + r];
        std::vector<double> change = solve_positive(matrix, right);
        for (std::int64_t g = 0; g < count; ++g) {
            // All its codes are zero points: any scale does, the old one stays.
            const double wanted = matrix[g * count + g] > 0.0 ? change[g] : 0.0;
            change[g] = storable_change(scales_[(first + g) * kRows + r], wanted, p_.grid);
        }
        if (added_loss(matrix, right, change) >= 0.0) return;
        for (std::int64_t g = 0; g < count; ++g) {
            float& scale = scales_[(first + g) * kRows + r];
            scale = static_cast<float>(double{scale} + change[g]);
        }
    }

    const Problem& p_;
    std::int64_t row_, rows_;
    std::vector<float> weights_, steps_, errors_;  // [C][64]; steps: codes − zeros
    std::vector<float> scales_;                    // [G][64]
};

template <class Visit>
void for_each_row_block(const Problem& problem, const Visit& visit) {
#pragma omp parallel for schedule(dynamic, 1)
    for (std::int64_t row = 0; row < problem.rows; row += kRows) {
        RowBlock block(problem, row);
        visit(block);
    }
}

Problem problem_of(const ConstTensorView& weights, const ConstTensorView& hessian,
                   const QuantizationGrid& grid, const QuantizedViews& quantized, const char* operation) {
    require_refine_operands(weights, hessian, grid, quantized, operation);
    return {weights.data<float>(),
            hessian.data<float>(),
            weights.extent(0),
            weights.extent(1),
            grid,
            quantized.codes.data<std::uint8_t>(),
            quantized.scales.data<Half>(),
            quantized.zeros.data<std::uint8_t>()};
}

}  // namespace

std::size_t CpuBackend::refine_workspace(std::int64_t, std::int64_t columns,
                                         const QuantizationGrid& grid) const {
    const std::int64_t window = std::min(columns, kRefitWindow * grid.group_size);
    const auto lanes = static_cast<std::size_t>(threads() * kRows);
    return lanes * (static_cast<std::size_t>(4 * columns + window) * sizeof(float) +
                    static_cast<std::size_t>(kRefitWindow * (kRefitWindow + 1)) * sizeof(double));
}

void CpuBackend::mirror_triangle(TensorView h) {
    const std::int64_t n = square_order(h, "mirror_triangle");
    auto* elements = h.data<float>();
    constexpr std::int64_t kTile = 64;  // both sides of the diagonal stay in the cache
#pragma omp parallel for schedule(dynamic, 1)
    for (std::int64_t top = 0; top < n; top += kTile) {
        for (std::int64_t left = 0; left <= top; left += kTile) {
            for (std::int64_t i = top; i < std::min(top + kTile, n); ++i) {
                for (std::int64_t j = left; j < std::min(left + kTile, i); ++j) {
                    elements[j * n + i] = elements[i * n + j];
                }
            }
        }
    }
}

void CpuBackend::quadratic_loss(ConstTensorView weights, ConstTensorView hessian,
                                const QuantizationGrid& grid, QuantizedViews quantized, TensorView loss) {
    const Problem problem = problem_of(weights, hessian, grid, quantized, "quadratic_loss");
    require_operands(is(loss, DType::f32, {problem.rows}), "quadratic_loss", {weights, loss});
    auto* out = loss.data<float>();
    for_each_row_block(problem, [out](const RowBlock& block) { block.losses(out); });
}

void CpuBackend::sweep_codes(ConstTensorView weights, ConstTensorView hessian, const QuantizationGrid& grid,
                             QuantizedViews quantized) {
    const Problem problem = problem_of(weights, hessian, grid,
                                       {quantized.codes, quantized.scales, quantized.zeros}, "sweep_codes");
    auto* codes = quantized.codes.data<std::uint8_t>();
    for_each_row_block(problem, [codes](RowBlock& block) { block.sweep(codes); });
}

void CpuBackend::refit_scales(ConstTensorView weights, ConstTensorView hessian, const QuantizationGrid& grid,
                              QuantizedViews quantized) {
    const Problem problem = problem_of(weights, hessian, grid,
                                       {quantized.codes, quantized.scales, quantized.zeros}, "refit_scales");
    auto* scales = quantized.scales.data<Half>();
    for_each_row_block(problem, [scales](RowBlock& block) { block.refit(scales); });
}

}  // namespace quantmill
