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
constexpr std::int64_t kBlock = 128;            // columns whose earlier errors come in one product

// Operands of a solve. The factor holds C_ij = R_ij / R_jj above and R_jj on its diagonal.
struct Problem {
    const float* weights;  // [R, C]
    const float* factor;   // [C, C]
    std::int64_t rows;     // R
    std::int64_t columns;  // C
    QuantizationGrid grid;
    std::uint8_t* codes;  // [R, C]
    Half* scales;         // [R, G]
    std::uint8_t* zeros;  // [R, G]
    float* loss;          // [R]
};

// The grid of one group for every row of a block.
struct Lanes {
    float scale[kRows];
    float zero[kRows];
};

// Quantizes a column of targets w + push; leaves the error w − q and adds (target − q)² · weight to the loss.
QUANTMILL_HOT_LOOP void quantize_column(const float* pushes, const float* weights, const Lanes& lanes,
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

// Widens each row's range by weights + pushes of `count` columns.
QUANTMILL_HOT_LOOP void widen_range(const float* weights, const float* pushes, std::int64_t count, float* low,
                                    float* high) {
    for (std::int64_t j = 0; j < count; ++j) {
        for (std::int64_t r = 0; r < kRows; ++r) {
            const float updated = weights[j * kRows + r] + pushes[j * kRows + r];
            low[r] = std::min(low[r], updated);
            high[r] = std::max(high[r], updated);
        }
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
          continued_(static_cast<std::size_t>(problem.grid.group_size * kRows)),
          group_weights_(continued_.size()),
          codes_(kBlock * kRows) {}

    void solve(std::int64_t first_row) {
        row_ = first_row;
        rows_ = std::min(kRows, p_.rows - first_row);
        std::fill_n(loss_, kRows, 0.0);
        for (std::int64_t begin = 0; begin < p_.columns; begin += kBlock) {
            solve_columns(begin, std::min(begin + kBlock, p_.columns));
        }
        for (std::int64_t r = 0; r < rows_; ++r) p_.loss[row_ + r] = static_cast<float>(loss_[r]);
    }

private:
    // Columns [begin, end), cut where groups end.
    void solve_columns(std::int64_t begin, std::int64_t end) {
        const std::int64_t group_size = p_.grid.group_size;
        load_weights(begin, end, weights_.data());
        std::fill(pushes_.begin(), pushes_.end(), 0.0F);
        add_errors(0, begin, begin, end, pushes_.data());
        for (std::int64_t column = begin; column < end;) {
            const std::int64_t group = column / group_size;
            const std::int64_t group_end = std::min((group + 1) * group_size, p_.columns);
            const std::int64_t stop = std::min(end, group_end);
            add_errors(begin, column, column, stop, pushes_.data() + (column - begin) * kRows);
            if (column == group * group_size) choose_grid(begin, end, column, group_end);
            walk(begin, column, stop);
            column = stop;
        }
        store_codes(begin, end);
    }

    // Rows of the block, columns [begin, end) -> [column][row].
    void load_weights(std::int64_t begin, std::int64_t end, float* out) const {
        for (std::int64_t j = begin; j < end; ++j) {
            float* lanes = out + (j - begin) * kRows;
            for (std::int64_t r = 0; r < rows_; ++r) {
                lanes[r] = p_.weights[(row_ + r) * p_.columns + j];
            }
            std::fill(lanes + rows_, lanes + kRows, 0.0F);
        }
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
        float low[kRows] = {};  // a range that includes 0, for symmetric grids too
        float high[kRows] = {};
        widen_range(weights, continued_.data(), width, low, high);
        store_grid(column / p_.grid.group_size, low, high);
    }

    void store_grid(std::int64_t group, const float* low, const float* high) {
        const std::int64_t groups = p_.grid.groups(p_.columns);
        for (std::int64_t r = 0; r < kRows; ++r) {
            const GroupParameters parameters = group_parameters(low[r], high[r], p_.grid);
            lanes_.scale[r] = to_float(parameters.scale);
            lanes_.zero[r] = static_cast<float>(parameters.zero);
            if (r >= rows_) continue;
            p_.scales[(row_ + r) * groups + group] = parameters.scale;
            p_.zeros[(row_ + r) * groups + group] = static_cast<std::uint8_t>(parameters.zero);
        }
    }

    void walk(std::int64_t begin, std::int64_t column, std::int64_t stop) {
        const auto max_code = static_cast<float>(p_.grid.max_code());
        for (std::int64_t j = column; j < stop; ++j) {
            const std::int64_t lanes = (j - begin) * kRows;
            const float* row = p_.factor + j * p_.columns;
            const double importance = double{row[j]} * double{row[j]};
            float* errors = errors_.data() + j * kRows;
            quantize_column(pushes_.data() + lanes, weights_.data() + lanes, lanes_, max_code, importance,
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
    std::vector<float> continued_;      // [group][64]
    std::vector<float> group_weights_;  // [group][64], of a group wider than its block
    std::vector<std::uint8_t> codes_;   // [128][64]
    Lanes lanes_{};
    double loss_[kRows] = {};
};

}  // namespace

std::size_t CpuBackend::solve_workspace(std::int64_t, std::int64_t columns, const QuantizationGrid&) const {
    return static_cast<std::size_t>(threads() * columns * kRows) * sizeof(float);  // each thread's errors
}

void CpuBackend::gptq_solve(ConstTensorView weights, ConstTensorView factor, const QuantizationGrid& grid,
                            QuantizedViews out, TensorView loss) {
    require_solve_operands(weights, factor, grid, out, loss);
    const Problem problem{weights.data<float>(),
                          factor.data<float>(),
                          weights.extent(0),
                          weights.extent(1),
                          grid,
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

}  // namespace quantmill
