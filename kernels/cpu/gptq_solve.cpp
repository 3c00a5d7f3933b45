#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/scale_search.h"
#include "kernels/grid.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

constexpr std::int64_t kRows = kRowLanes;
constexpr std::int64_t kBlock = 128;  // columns whose earlier errors come in one product

// Operands of a solve. The factor holds C_ij = R_ij / R_jj above and R_jj on its diagonal.
struct Problem {
    const float* weights;  // [R, C]
    const float* factor;   // [C, C]
    std::int64_t rows;     // R
    std::int64_t columns;  // C
    QuantizationGrid grid;
    const std::int32_t* groups;  // [C]: of each column, whose scales and zeros are given; or null
    std::uint8_t* codes;         // [R, C]
    Half* scales;                // [R, G]
    std::uint8_t* zeros;         // [R, G]
    float* loss;                 // [R]
};

// Quantizes a column of targets w + push; leaves the error w − q and adds (target − q)² · weight to the loss.
QUANTMILL_HOT_LOOP void quantize_column(const float* pushes, const float* weights, const GridLanes& lanes,
                                        float max_code, double importance, float* errors, std::uint8_t* codes,
                                        double* loss) {
    for (std::int64_t r = 0; r < kRows; ++r) {
        const float target = weights[r] + pushes[r];
        const float code = quantize(target, lanes.scale[r], lanes.zero[r], max_code);
        const float value = lanes.scale[r] * (code - lanes.zero[r]);
        const double miss = double{target} - double{value};
        codes[r] = static_cast<std::uint8_t>(static_cast<int>(code));
        errors[r] = weights[r] - value;
        loss[r] += miss * miss * importance;
    }
}

// pushes[j] += errors · row[j] for the `count` columns to the right of the errors' column.
QUANTMILL_HOT_LOOP void feed_forward(const float* errors, const float* row, std::int64_t count,
                                     float* pushes) {
    for (std::int64_t j = 0; j < count; ++j) {
        for (std::int64_t r = 0; r < kRows; ++r) pushes[j * kRows + r] += errors[r] * row[j];
    }
}

QUANTMILL_HOT_LOOP void add(const float* x, std::int64_t count, float* sum) {
    for (std::int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

// R_jj² of columns [first, last).
std::vector<float> importance_of(const Problem& p, std::int64_t first, std::int64_t last) {
    std::vector<float> importance;
    for (std::int64_t j = first; j < last; ++j) {
        const float diagonal = p.factor[j * p.columns + j];
        importance.push_back(diagonal * diagonal);
    }
    return importance;
}

// `rows` rows of `width` columns -> [column][row]; rows beyond are zero.
void transpose(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t width, float* out) {
    for (std::int64_t j = 0; j < width; ++j) {
        float* lanes = out + j * kRows;
        for (std::int64_t r = 0; r < rows; ++r) lanes[r] = x[r * stride + j];
        std::fill(lanes + rows, lanes + kRows, 0.0F);
    }
}

void store_grid(const GridLanes& lanes, std::int64_t row, std::int64_t rows, std::int64_t group,
                std::int64_t groups, Half* scales, std::uint8_t* zeros) {
    for (std::int64_t r = 0; r < rows; ++r) {
        scales[(row + r) * groups + group] = to_half(lanes.scale[r]);
        zeros[(row + r) * groups + group] = static_cast<std::uint8_t>(lanes.zero[r]);
    }
}

// Solves one block of 64 rows at a time. Everything is transposed, [column][row], so that rows are the
// lanes; rows past the tensor's end are zero, so every block runs the same instructions.
class RowBlockSolver {
public:
    explicit RowBlockSolver(const Problem& problem)
        : p_(problem),
          errors_(static_cast<std::size_t>(problem.columns * kRows)),
          weights_(kBlock * kRows),
          pushes_(kBlock * kRows),
          codes_(kBlock * kRows) {
        if (p_.groups != nullptr) return;
        continued_.resize(static_cast<std::size_t>(problem.grid.group_size * kRows));
        group_weights_.resize(continued_.size());
    }

    void solve(std::int64_t first_row) {
        row_ = first_row;
        rows_ = std::min(kRows, p_.rows - first_row);
        std::fill_n(loss_, kRows, 0.0);
        if (p_.groups != nullptr) load_grids();
        for (std::int64_t begin = 0; begin < p_.columns; begin += kBlock) {
            solve_columns(begin, std::min(begin + kBlock, p_.columns));
        }
        for (std::int64_t r = 0; r < rows_; ++r) p_.loss[row_ + r] = static_cast<float>(loss_[r]);
    }

private:
    // Columns [begin, end), cut where groups end unless their grids are given.
    void solve_columns(std::int64_t begin, std::int64_t end) {
        const bool given = p_.groups != nullptr;
        const std::int64_t group_size = given ? p_.columns : p_.grid.group_size;
        load_weights(begin, end, weights_.data());
        std::fill(pushes_.begin(), pushes_.end(), 0.0F);
        add_errors(0, begin, begin, end, pushes_.data());
        for (std::int64_t column = begin; column < end;) {
            const std::int64_t group = column / group_size;
            const std::int64_t group_end = std::min((group + 1) * group_size, p_.columns);
            const std::int64_t stop = std::min(end, group_end);
            add_errors(begin, column, column, stop, pushes_.data() + (column - begin) * kRows);
            if (!given && column == group * group_size) choose_grid(begin, end, column, group_end);
            walk(begin, column, stop);
            column = stop;
        }
        store_codes(begin, end);
    }

    // Rows of the block, columns [begin, end) -> [column][row].
    void load_weights(std::int64_t begin, std::int64_t end, float* out) const {
        transpose(p_.weights + row_ * p_.columns + begin, p_.columns, rows_, end - begin, out);
    }

    // out[j] += Σ errors[i] · C_ij for i in [first, last), j in [begin, end).
    void add_errors(std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end,
                    float* out) const {
        if (first == last) return;
        sgemm(end - begin, kRows, last - first, 1.0F,
              {p_.factor + first * p_.columns + begin, p_.columns, true},
              {errors_.data() + first * kRows, kRows}, 1.0F, out, kRows);
    }

    // Scales and zeros of the group [column, group_end) from its updated weights S = W + Y,
    // Y = P · (I + triu(C_gg, 1))⁻¹, P = what the errors of earlier columns add to the group.
    void choose_grid(std::int64_t begin, std::int64_t end, std::int64_t column, std::int64_t group_end) {
        const std::int64_t width = group_end - column;
        const float* weights = weights_.data() + (column - begin) * kRows;
        if (group_end > end) {  // the group goes on in later blocks
            load_weights(column, group_end, group_weights_.data());
            weights = group_weights_.data();
            std::fill_n(continued_.begin(), width * kRows, 0.0F);
            add_errors(0, column, column, group_end, continued_.data());
        } else {
            std::copy_n(pushes_.begin() + (column - begin) * kRows, width * kRows, continued_.begin());
        }
        if (column > 0) {
            cblas_strsm(CblasRowMajor, CblasLeft, CblasUpper, CblasTrans, CblasUnit,
                        static_cast<blasint>(width), static_cast<blasint>(kRows), 1.0F,
                        p_.factor + column * p_.columns + column, static_cast<blasint>(p_.columns),
                        continued_.data(), static_cast<blasint>(kRows));
        }
        add(weights, width * kRows, continued_.data());  // S
        std::vector<float> importance;
        if (p_.grid.search == ScaleSearch::hessian) importance = importance_of(p_, column, group_end);
        grids_.assign(1, choose_grid_lanes(continued_.data(), width, importance.data(), p_.grid));
        store_grid(grids_.front(), row_, rows_, column / p_.grid.group_size, p_.grid.groups(p_.columns),
                   p_.scales, p_.zeros);
    }

    void load_grids() {
        const std::int64_t groups = p_.grid.groups(p_.columns);
        grids_.assign(static_cast<std::size_t>(groups), GridLanes{});
        for (std::int64_t g = 0; g < groups; ++g) {
            GridLanes& lanes = grids_[static_cast<std::size_t>(g)];
            std::fill_n(lanes.scale, kRows, 1.0F);
            for (std::int64_t r = 0; r < rows_; ++r) {
                lanes.scale[r] = to_float(p_.scales[(row_ + r) * groups + g]);
                lanes.zero[r] = static_cast<float>(p_.zeros[(row_ + r) * groups + g]);
            }
        }
    }

    const GridLanes& grid_of(std::int64_t column) const {
        return p_.groups == nullptr ? grids_.front() : grids_[static_cast<std::size_t>(p_.groups[column])];
    }

    void walk(std::int64_t begin, std::int64_t column, std::int64_t stop) {
        const auto max_code = static_cast<float>(p_.grid.max_code());
        for (std::int64_t j = column; j < stop; ++j) {
            const std::int64_t lanes = (j - begin) * kRows;
            const float* row = p_.factor + j * p_.columns;
            const double importance = double{row[j]} * double{row[j]};
            float* errors = errors_.data() + j * kRows;
            quantize_column(pushes_.data() + lanes, weights_.data() + lanes, grid_of(j), max_code, importance,
                            errors, codes_.data() + lanes, loss_);
            feed_forward(errors, row + j + 1, stop - j - 1, pushes_.data() + lanes + kRows);
        }
    }

    void store_codes(std::int64_t begin, std::int64_t end) const {
        for (std::int64_t r = 0; r < rows_; ++r) {
            std::uint8_t* codes = p_.codes + (row_ + r) * p_.columns;
            for (std::int64_t j = begin; j < end; ++j) codes[j] = codes_[(j - begin) * kRows + r];
        }
    }

    Problem p_;
    std::int64_t row_ = 0;        // first row of the block
    std::int64_t rows_ = 0;       // rows of the block that exist
    std::vector<float> errors_;   // [C][64], (W − Q)ᵀ
    std::vector<float> weights_;  // [128][64], of the block of columns
    // [128][64]: what errors so far add to the block's targets; beside the weights, since it is as small as
    // the errors and would lose its last bits to each sum with them.
    std::vector<float> pushes_;
    std::vector<float> continued_;      // [group][64], then S
    std::vector<float> group_weights_;  // [group][64], of a group wider than its block
    std::vector<std::uint8_t> codes_;   // [128][64]
    std::vector<GridLanes> grids_;      // of the current group, or of all groups when they are given
    double loss_[kRows] = {};
};

void solve_all(ConstTensorView weights, ConstTensorView factor, const QuantizationGrid& grid,
               const std::int32_t* groups, QuantizedViews out, TensorView loss) {
    const Problem problem{weights.data<float>(),
                          factor.data<float>(),
                          weights.extent(0),
                          weights.extent(1),
                          grid,
                          groups,
                          out.codes.data<std::uint8_t>(),
                          out.scales.data<Half>(),
                          out.zeros.data<std::uint8_t>(),
                          loss.data<float>()};
#pragma omp parallel
    {
        RowBlockSolver solver(problem);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t row = 0; row < problem.rows; row += kRows) solver.solve(row);
    }
}

}  // namespace

std::size_t CpuBackend::solve_workspace(std::int64_t, std::int64_t columns, const QuantizationGrid&) const {
    return static_cast<std::size_t>(threads() * columns * kRows) * sizeof(float);  // each thread's errors
}

void CpuBackend::gptq_solve(ConstTensorView weights, ConstTensorView factor, const QuantizationGrid& grid,
                            QuantizedViews out, TensorView loss) {
    require_solve_operands(weights, factor, grid, out, loss);
    solve_all(weights, factor, grid, nullptr, out, loss);
}

void CpuBackend::gptq_solve_static(ConstTensorView weights, ConstTensorView factor,
                                   std::span<const std::int32_t> groups, const QuantizationGrid& grid,
                                   QuantizedViews quantized, TensorView loss) {
    require_solve_operands(weights, factor, grid, quantized, loss);
    require_group_index(groups, grid, weights.extent(1));
    solve_all(weights, factor, grid, groups.data(), quantized, loss);
}

void CpuBackend::choose_grids(ConstTensorView weights, std::span<const float> importance,
                              const QuantizationGrid& grid, QuantizedViews out) {
    require_grid_operands(weights, importance, grid, out);
    const std::int64_t rows = weights.extent(0);
    const std::int64_t columns = weights.extent(1);
    const std::int64_t groups = grid.groups(columns);
    const std::vector<float> alike(importance.empty() ? static_cast<std::size_t>(columns) : 0, 1.0F);
    const float* column_importance = importance.empty() ? alike.data() : importance.data();
#pragma omp parallel for schedule(dynamic, 1)
    for (std::int64_t row = 0; row < rows; row += kRows) {
        const std::int64_t count = std::min(kRows, rows - row);
        std::vector<float> group;
        for (std::int64_t g = 0; g < groups; ++g) {
            const std::int64_t first = g * grid.group_size;
            const std::int64_t width = std::min(grid.group_size, columns - first);
            group.resize(static_cast<std::size_t>(width * kRows));
            transpose(weights.data<float>() + row * columns + first, columns, count, width, group.data());
            store_grid(choose_grid_lanes(group.data(), width, column_importance + first, grid), row, count, g,
                       groups, out.scales.data<Half>(), out.zeros.data<std::uint8_t>());
        }
    }
}

}  // namespace quantmill
