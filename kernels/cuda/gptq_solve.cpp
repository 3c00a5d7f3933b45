#include <algorithm>
#include <cstdint>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

using cuda::kSolveBlock;

constexpr std::int64_t kPanel = 1024;
constexpr std::int64_t kStrip = 16;  // columns that a kernel's inner loop quantizes (gptq_solve.cu)

// How columns are cut: panels, the long products, hold blocks, one kernel each, and neither splits a
// group unless the group is wider; one group for all columns needs no care, its range is known at once.
struct Cut {
    std::int64_t block = kSolveBlock, panel = kPanel;
    bool one_group, wide_groups;
    cuda::SolveSlots slots{kSolveBlock, kSolveBlock, 1, kSolveBlock, kSolveBlock};

    Cut(std::int64_t group_size, std::int64_t columns)
        : one_group(group_size >= columns), wide_groups(!one_group && group_size > kSolveBlock) {
        if (one_group) return;
        std::int64_t whole = group_size;
        if (wide_groups) {
            slots.run = group_size;
            slots.per_run = (group_size + block - 1) / block;
        } else {
            const std::int64_t padded = (group_size + kStrip - 1) / kStrip * kStrip;
            whole = block = kSolveBlock / padded * group_size;
            slots = {block, block, 1, static_cast<int>(group_size), static_cast<int>(padded)};
        }
        panel = std::max<std::int64_t>(kPanel / whole, 1) * whole;
    }
};

std::int64_t padded(std::int64_t columns) { return (columns + 31) / 32 * 32; }

// Left-looking in two levels: a panel takes what the errors W − Q of all earlier columns push onto it in
// one product, then each of its blocks what the panel's earlier blocks push. The products run on tensor
// cores with bf16 operands in two parts, a·b ≈ high·high + high·low + low·high, which keeps codes next to
// those of fp32 sums (bench/RESULTS.md); a block's three parts lie together, so a range of blocks is one
// product with three times the depth. Up to kExactColumns they are products in fp32 of errors and factor.
class Solver {
public:
    Solver(CudaBackend& backend, cuda::Gemm& gemm, const cuda::SolveRows& rows)
        : gemm_(gemm),
          stream_(backend.stream()),
          rows_(rows),
          cut_(rows.given == nullptr ? rows.grid.group_size : rows.columns, rows.columns),
          slots_(cut_.slots),
          ld_pushes_(padded(std::min(cut_.panel, rows.columns))),
          ld_parts_((slots_.of(rows.columns - 1) + 1) * cuda::kSolveSlot),
          pushes_(backend.empty({rows.rows, ld_pushes_}, DType::f32, "a solve's pushes")) {
        rows_.exact = rows.columns <= cuda::kExactColumns;
        rows_.ld_errors = rows_.exact ? rows.columns : ld_parts_;
        errors_ = backend.empty({rows.rows, rows_.ld_errors}, rows_.exact ? DType::f32 : DType::bf16,
                                "a solve's errors");
        if (!rows_.exact) {
            factor_ = backend.empty({ld_pushes_, ld_parts_}, DType::bf16, "a panel of the factor");
        }
        rows_.errors = errors_.view().bytes();
        rows_.slots = slots_;
        if (rows.given != nullptr || (!cut_.one_group && !cut_.wide_groups)) return;
        importance_ = backend.empty({rows.columns}, DType::f32, "importance of columns");
        if (!cut_.wide_groups) return;
        ranges_ = backend.empty({rows.rows, 2}, DType::f32, "ranges of a group");
        continued_ = backend.empty({rows.rows, ld_pushes_}, DType::f32, "continued pushes of a group");
        backend.zero(continued_);  // a kernel loads whole vectors, also beyond a block's last column
    }

    static std::size_t workspace(std::int64_t rows, std::int64_t columns, std::int64_t group_size) {
        const Cut cut(group_size, columns);
        cuda::SolveSlots slots = cut.slots;
        const std::int64_t parts = (slots.of(columns - 1) + 1) * cuda::kSolveSlot;
        const std::int64_t panel = padded(std::min(cut.panel, columns));
        const std::int64_t pushes = cut.wide_groups ? 2 * panel : panel;
        const std::size_t errors =
            columns <= cuda::kExactColumns
                ? static_cast<std::size_t>(rows * columns) * size_of(DType::f32)
                : static_cast<std::size_t>((rows + panel) * parts) * size_of(DType::bf16);
        return errors + static_cast<std::size_t>(rows * (pushes + 2)) * size_of(DType::f32);
    }

    void run(CudaBackend& backend) {
        backend.zero(pushes_);
        const bool choose = rows_.given == nullptr;
        if (choose && (cut_.one_group || cut_.wide_groups)) {
            cuda::importance(rows_.factor, rows_.columns, floats(importance_), stream_);
        }
        for (panel_ = 0; panel_ < rows_.columns; panel_ += cut_.panel) {
            panel_end_ = std::min(panel_ + cut_.panel, rows_.columns);
            if (!rows_.exact) {
                cuda::factor_slots(rows_.factor, rows_.columns, slots_, slots_.of(panel_end_ - 1) + 1, panel_,
                                   panel_end_, factor_.view().bytes(), ld_parts_, stream_);
            }
            if (panel_ > 0) push(0, panel_, panel_, panel_end_, nullptr, floats(pushes_));
            if (cut_.wide_groups) {
                solve_wide_groups();
            } else {
                if (choose && cut_.one_group && panel_ == 0) choose_grid(0, nullptr);
                solve_blocks(panel_, panel_end_, cut_.one_group);
            }
        }
    }

private:
    static float* floats(Tensor& tensor) { return reinterpret_cast<float*>(tensor.view().bytes()); }
    static std::byte* parts(Tensor& tensor, std::int64_t element) {
        return tensor.view().bytes() + element * static_cast<std::int64_t>(size_of(DType::bf16));
    }

    // out[:, begin:end] = base[:, begin:end] + errors[:, first:last] · C[first:last, begin:end];
    // base and out are panels of pushes, begin and end columns of the matrix.
    void push(std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end, const float* base,
              float* out) {
        if (first == last) return;
        const std::int64_t offset = begin - panel_;
        const float beta = base == nullptr ? 0.0F : 1.0F;
        const float* c = (base == nullptr ? out : base) + offset;
        if (rows_.exact) {
            return gemm_.run(
                {.rows = rows_.rows,
                 .columns = end - begin,
                 .depth = last - first,
                 .ldx = rows_.columns,
                 .ldy = rows_.columns,
                 .ldd = ld_pushes_,
                 .beta = beta,
                 .rows_vary = true},
                {floats(errors_) + first, rows_.factor + first * rows_.columns + begin, c, out + offset},
                stream_);
        }
        const std::int64_t slot = slots_.of(first) * cuda::kSolveSlot;
        gemm_.run({.input = CUDA_R_16BF,
                   .rows = rows_.rows,
                   .columns = end - begin,
                   .depth = slots_.of(last) * cuda::kSolveSlot - slot,
                   .ldx = ld_parts_,
                   .ldy = ld_parts_,
                   .ldd = ld_pushes_,
                   .y_by_columns = true,
                   .beta = beta,
                   .rows_vary = true},
                  {parts(errors_, slot), parts(factor_, offset * ld_parts_ + slot), c, out + offset},
                  stream_);
    }

    cuda::SolveBlock block_at(std::int64_t begin, std::int64_t end, const float* pushes, bool grid_known) {
        const std::int64_t slot = slots_.of(begin);
        const std::int64_t element = (begin - panel_) * ld_parts_ + slot * cuda::kSolveSlot;
        return {.first = begin,
                .slot = slot,
                .width = static_cast<int>(end - begin),
                .factor = rows_.exact ? nullptr : parts(factor_, element),
                .ld_factor = ld_parts_,
                .pushes = pushes + (begin - panel_),
                .ld_pushes = ld_pushes_,
                .grid_known = grid_known};
    }

    // Quantizes [begin, end) of the panel, given what all columns before `begin` push onto it.
    void solve_blocks(std::int64_t begin, std::int64_t end, bool grid_known) {
        for (std::int64_t column = begin; column < end; column += cut_.block) {
            const std::int64_t stop = std::min(column + cut_.block, end);
            push(begin, column, column, stop, floats(pushes_), floats(pushes_));
            cuda::solve_block(rows_, block_at(column, stop, floats(pushes_), grid_known), stream_);
        }
    }

    void solve_wide_groups() {
        for (std::int64_t begin = panel_; begin < panel_end_; begin += rows_.grid.group_size) {
            const std::int64_t end = std::min(begin + rows_.grid.group_size, panel_end_);
            push(panel_, begin, begin, end, floats(pushes_), floats(pushes_));
            if (begin == 0) {
                choose_grid(0, nullptr);
            } else {
                choose_from_updated_weights(begin, end);
            }
            solve_blocks(begin, end, true);
        }
    }

    void choose_grid(std::int64_t group, const void* ranges) {
        cuda::choose_grids(rows_, group, 1, ranges, floats(importance_), stream_);
    }

    // S = W + Z, Z = P · (I + triu(C_gg, 1))⁻¹, block by block: while Z is made its negative stands in
    // the errors of the group, which are not known yet.
    void choose_from_updated_weights(std::int64_t begin, std::int64_t end) {
        for (std::int64_t column = begin; column < end; column += cut_.block) {
            const std::int64_t stop = std::min(column + cut_.block, end);
            push(begin, column, column, stop, floats(pushes_), floats(continued_));
            const float* pushes = column == begin ? floats(pushes_) : floats(continued_);
            cuda::continue_block(rows_, block_at(column, stop, pushes, false), ranges_.view().bytes(),
                                 stream_);
        }
        choose_grid(begin / rows_.grid.group_size, ranges_.view().bytes());
    }

    cuda::Gemm& gemm_;
    cudaStream_t stream_;
    cuda::SolveRows rows_;
    Cut cut_;
    cuda::SolveSlots slots_;
    std::int64_t ld_pushes_, ld_parts_;
    Tensor pushes_;      // [R, panel]
    Tensor errors_;      // bf16 [R, slots]; exact: f32 [R, C]
    Tensor factor_;      // bf16 [panel, slots]: the panel's columns of C, transposed; exact: none
    Tensor importance_;  // [C]: R_jj²
    Tensor ranges_;      // [R, 2]
    Tensor continued_;   // [R, panel]
    std::int64_t panel_ = 0, panel_end_ = 0;
};

cuda::SolveRows solve_rows(ConstTensorView weights, const QuantizationGrid& grid, const QuantizedViews& out) {
    return {.weights = reinterpret_cast<const float*>(weights.bytes()),
            .factor = nullptr,
            .errors = nullptr,
            .codes = nullptr,
            .scales = out.scales.bytes(),
            .zeros = reinterpret_cast<std::uint8_t*>(out.zeros.bytes()),
            .loss = nullptr,
            .given = nullptr,
            .rows = weights.extent(0),
            .columns = weights.extent(1),
            .groups = grid.groups(weights.extent(1)),
            .ld_errors = 0,
            .exact = false,
            .grid = {grid.bits, grid.group_size, grid.sym, grid.search, grid.signed_scales, grid.bf16_scales},
            .slots = {}};
}

cuda::SolveRows solve_rows(ConstTensorView weights, ConstTensorView factor, const QuantizationGrid& grid,
                           const QuantizedViews& out, TensorView loss) {
    cuda::SolveRows rows = solve_rows(weights, grid, out);
    rows.factor = reinterpret_cast<const float*>(factor.bytes());
    rows.codes = reinterpret_cast<std::uint8_t*>(out.codes.bytes());
    rows.loss = reinterpret_cast<float*>(loss.bytes());
    return rows;
}

}  // namespace

std::size_t CudaBackend::solve_workspace(std::int64_t rows, std::int64_t columns,
                                         const QuantizationGrid& grid) const {
    // Given grids are solved in blocks that no group cuts.
    const std::size_t most = std::max(Solver::workspace(rows, columns, grid.group_size),
                                      Solver::workspace(rows, columns, columns));
    return most + static_cast<std::size_t>(columns) * size_of(DType::f32);  // importance or groups of columns
}

void CudaBackend::gptq_solve(ConstTensorView weights, ConstTensorView factor, const QuantizationGrid& grid,
                             QuantizedViews out, TensorView loss) {
    require_solve_operands(weights, factor, grid, out, loss);
    if (weights.shape().count() == 0) return zero(loss);
    Solver(*this, *gemm_, solve_rows(weights, factor, grid, out, loss)).run(*this);
}

void CudaBackend::gptq_solve_static(ConstTensorView weights, ConstTensorView factor,
                                    std::span<const std::int32_t> groups, const QuantizationGrid& grid,
                                    QuantizedViews quantized, TensorView loss) {
    require_solve_operands(weights, factor, grid, quantized, loss);
    require_group_index(groups, grid, weights.extent(1));
    if (weights.shape().count() == 0) return zero(loss);
    const Tensor given = upload(groups, "groups of columns");
    cuda::SolveRows rows = solve_rows(weights, factor, grid, quantized, loss);
    rows.given = reinterpret_cast<const std::int32_t*>(given.view().bytes());
    Solver(*this, *gemm_, rows).run(*this);
}

void CudaBackend::choose_grids(ConstTensorView weights, std::span<const float> importance,
                               const QuantizationGrid& grid, QuantizedViews out) {
    require_grid_operands(weights, importance, grid, out);
    if (weights.shape().count() == 0) return;
    const Tensor weighed = upload(importance, "importance of columns");
    const cuda::SolveRows rows = solve_rows(weights, grid, out);
    const auto* values = reinterpret_cast<const float*>(weighed.view().bytes());
    cuda::choose_grids(rows, 0, rows.groups, nullptr, importance.empty() ? nullptr : values, stream_);
}

}  // namespace quantmill
