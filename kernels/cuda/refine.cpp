#include <algorithm>
#include <cstdint>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

using cuda::kRefineBlock;
static_assert(kRefitWindow == cuda::kRefitGroups);

constexpr std::int64_t kChunk = 4096;      // rows that are refined together: what bounds the workspace
constexpr std::int64_t kLossPanel = 1024;  // columns of H in a product for losses

// Refines rows in chunks. Products run in fp32 up to kExactColumns, in TF32 beyond: there an error of 2^-11
// of a target moves codes next to a rounding boundary only, where both neighbours cost the same.
class Refiner {
public:
    Refiner(CudaBackend& backend, cuda::Gemm& gemm, ConstTensorView weights, ConstTensorView hessian,
            const QuantizationGrid& grid, const QuantizedViews& quantized)
        : backend_(backend),
          gemm_(gemm),
          grid_(grid),
          hessian_(reinterpret_cast<const float*>(hessian.bytes())),
          all_{.weights = reinterpret_cast<const float*>(weights.bytes()),
               .codes = reinterpret_cast<std::uint8_t*>(quantized.codes.bytes()),
               .scales = quantized.scales.bytes(),
               .zeros = reinterpret_cast<const std::uint8_t*>(quantized.zeros.bytes()),
               .rows = weights.extent(0),
               .columns = weights.extent(1),
               .groups = grid.groups(weights.extent(1)),
               .group_size = grid.group_size,
               .max_code = static_cast<float>(grid.max_code())},
          chunk_(std::min(kChunk, all_.rows)),
          errors_(backend.empty({chunk_, all_.columns}, DType::f32, "errors of rows to refine")) {}

    void losses(float* out) {
        const std::int64_t width = std::min(kLossPanel, all_.columns);
        Tensor products = backend_.empty({chunk_, width}, DType::f32, "products of a Hessian");
        Tensor sums = backend_.empty({chunk_ * 2}, DType::f32, "losses of rows in double");
        auto* totals = reinterpret_cast<double*>(sums.view().bytes());
        for_each_chunk([&](const cuda::RefineRows& rows, std::int64_t first_row) {
            cuda::refine_errors(rows, floats(errors_), nullptr, stream());
            backend_.zero(sums);
            for (std::int64_t begin = 0; begin < rows.columns; begin += width) {
                const std::int64_t end = std::min(begin + width, rows.columns);
                multiply(rows, floats(errors_), 0, rows.columns, begin, end, floats(products), end - begin);
                cuda::add_losses(floats(errors_) + begin, rows.columns, floats(products), end - begin,
                                 rows.rows, totals, stream());
            }
            cuda::store_losses(totals, rows.rows, out + first_row, stream());
        });
    }

    void sweep() {
        Tensor gradients = backend_.empty({chunk_, kRefineBlock}, DType::f32, "gradients of codes");
        for_each_chunk([&](const cuda::RefineRows& rows, std::int64_t) {
            cuda::refine_errors(rows, floats(errors_), nullptr, stream());
            for (std::int64_t begin = 0; begin < rows.columns; begin += kRefineBlock) {
                const std::int64_t end = std::min<std::int64_t>(begin + kRefineBlock, rows.columns);
                multiply(rows, floats(errors_), 0, rows.columns, begin, end, floats(gradients), kRefineBlock);
                cuda::sweep_block(rows, hessian_, begin, static_cast<int>(end - begin), floats(gradients),
                                  floats(errors_), stream());
            }
        });
    }

    void refit() {
        const std::int64_t widest = window_columns(grid_, all_.columns);
        Tensor steps = backend_.empty({chunk_, all_.columns}, DType::f32, "steps of codes");
        Tensor products = backend_.empty({chunk_, widest}, DType::f32, "products of a Hessian");
        Tensor systems =
            backend_.empty({chunk_ * kRefitWindow * (kRefitWindow + 1) * 2}, DType::f32, "systems of scales");
        for_each_chunk([&](const cuda::RefineRows& rows, std::int64_t) {
            for (std::int64_t first = 0; first < rows.groups; first += kRefitWindow) {
                cuda::refine_errors(rows, floats(errors_), floats(steps), stream());
                refit_window(rows, first, std::min(first + kRefitWindow, rows.groups), floats(steps),
                             floats(products), reinterpret_cast<double*>(systems.view().bytes()));
            }
        });
    }

    static std::size_t workspace(std::int64_t rows, std::int64_t columns, const QuantizationGrid& grid) {
        const std::int64_t chunk = std::min(kChunk, rows);
        const std::int64_t system = kRefitWindow * (kRefitWindow + 1) * 2;
        return static_cast<std::size_t>(chunk * (2 * columns + window_columns(grid, columns) + system)) *
               size_of(DType::f32);
    }

private:
    static float* floats(Tensor& tensor) { return reinterpret_cast<float*>(tensor.view().bytes()); }
    cudaStream_t stream() const { return backend_.stream(); }
    static std::int64_t window_columns(const QuantizationGrid& grid, std::int64_t columns) {
        return std::min(columns, kRefitWindow * grid.group_size);
    }

    template <class Visit>
    void for_each_chunk(const Visit& visit) {
        for (std::int64_t row = 0; row < all_.rows; row += chunk_) {
            cuda::RefineRows rows = all_;
            rows.rows = std::min(chunk_, all_.rows - row);
            rows.weights += row * all_.columns;
            rows.codes += row * all_.columns;
            rows.scales = static_cast<std::byte*>(all_.scales) +
                          static_cast<std::size_t>(row * all_.groups) * size_of(DType::f16);
            rows.zeros += row * all_.groups;
            visit(rows, row);
        }
    }

    // out = x[:, first:last] · H[first:last, begin:end]; x has the matrix's columns.
    void multiply(const cuda::RefineRows& rows, const float* x, std::int64_t first, std::int64_t last,
                  std::int64_t begin, std::int64_t end, float* out, std::int64_t ld_out) {
        gemm_.run({.compute = rows.columns <= cuda::kExactColumns ? CUBLAS_COMPUTE_32F
                                                                  : CUBLAS_COMPUTE_32F_FAST_TF32,
                   .rows = rows.rows,
                   .columns = end - begin,
                   .depth = last - first,
                   .ldx = rows.columns,
                   .ldy = rows.columns,
                   .ldd = ld_out,
                   .rows_vary = true},
                  {x + first, hessian_ + first * rows.columns + begin, out, out}, stream());
    }

    // kernels/cpu/refine.cpp says what the system of a window is.
    void refit_window(const cuda::RefineRows& rows, std::int64_t first, std::int64_t last, const float* steps,
                      float* products, double* systems) {
        constexpr std::int64_t kSystem = kRefitWindow * kRefitWindow;
        const std::int64_t count = last - first;
        const std::int64_t begin = first * rows.group_size;
        const std::int64_t end = std::min(last * rows.group_size, rows.columns);
        double* right = systems + rows.rows * kSystem;
        multiply(rows, floats(errors_), 0, rows.columns, begin, end, products, end - begin);
        cuda::dot_groups(rows, steps, begin, end, products, count, right, kRefitWindow, stream());
        for (std::int64_t h = 0; h < count; ++h) {
            const std::int64_t from = begin + h * rows.group_size;
            multiply(rows, steps, from, std::min(from + rows.group_size, end), begin, end, products,
                     end - begin);
            cuda::dot_groups(rows, steps, begin, end, products, count, systems + h * kRefitWindow, kSystem,
                             stream());
        }
        cuda::move_scales(rows, first, static_cast<int>(count), systems, right, grid_.bf16_scales, stream());
    }

    CudaBackend& backend_;
    cuda::Gemm& gemm_;
    QuantizationGrid grid_;
    const float* hessian_;
    cuda::RefineRows all_;
    std::int64_t chunk_;
    Tensor errors_;  // [chunk, C]
};

}  // namespace

std::size_t CudaBackend::refine_workspace(std::int64_t rows, std::int64_t columns,
                                          const QuantizationGrid& grid) const {
    return Refiner::workspace(rows, columns, grid);
}

void CudaBackend::mirror_triangle(TensorView h) {
    cuda::mirror_triangle(reinterpret_cast<float*>(h.bytes()), square_order(h, "mirror_triangle"), stream_);
}

void CudaBackend::quadratic_loss(ConstTensorView weights, ConstTensorView hessian,
                                 const QuantizationGrid& grid, QuantizedViews quantized, TensorView loss) {
    require_refine_operands(weights, hessian, grid, quantized, "quadratic_loss");
    require_operands(is(loss, DType::f32, {weights.extent(0)}), "quadratic_loss", {weights, loss});
    Refiner(*this, *gemm_, weights, hessian, grid, quantized).losses(reinterpret_cast<float*>(loss.bytes()));
}

void CudaBackend::sweep_codes(ConstTensorView weights, ConstTensorView hessian, const QuantizationGrid& grid,
                              QuantizedViews quantized) {
    require_refine_operands(weights, hessian, grid, quantized, "sweep_codes");
    Refiner(*this, *gemm_, weights, hessian, grid, quantized).sweep();
}

void CudaBackend::refit_scales(ConstTensorView weights, ConstTensorView hessian, const QuantizationGrid& grid,
                               QuantizedViews quantized) {
    require_refine_operands(weights, hessian, grid, quantized, "refit_scales");
    Refiner(*this, *gemm_, weights, hessian, grid, quantized).refit();
}

}  // namespace quantmill
