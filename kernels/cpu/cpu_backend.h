#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace quantmill {

// Host memory, fp32 compute: single-threaded OpenBLAS calls on tiles that depend on the operands' shapes
// only, spread over OpenMP threads, so the number of threads never changes a bit of any result.
// One file an operation family: gemm, elementwise, attention, hessian, cholesky, gptq_solve, refine, pack.
class CpuBackend final : public Backend {
public:
    // threads: OpenMP threads for all operations; one is used when OpenBLAS is a serial build, which
    // cannot be called from two threads at a time.
    explicit CpuBackend(int threads);

    std::string name() const override { return "cpu"; }
    std::string description() const override;
    DType activation_dtype() const override { return DType::f32; }
    std::size_t free_memory(int ranks) const override;
    std::size_t peak_memory() const override;
    bool host_memory() const override { return true; }
    std::int64_t micro_batch_tokens() const override { return 2048; }
    int threads() const override;

    void* allocate(std::size_t bytes, const std::string& what) override;
    void deallocate(void* memory) noexcept override;
    void copy_from_host(const void* source, TensorView destination) override;
    void copy_to_host(ConstTensorView source, void* destination) override;
    void copy(ConstTensorView source, TensorView destination) override;
    void zero(TensorView tensor) override;
    void convert(ConstTensorView source, TensorView destination) override;
    void synchronize() override {}

    void* allocate_host(std::size_t bytes, const std::string& what) override { return allocate(bytes, what); }
    void deallocate_host(void* memory, std::size_t) noexcept override { deallocate(memory); }
    std::unique_ptr<CopyLane> make_copy_lane() override;
    EventPtr record() override;
    void after(const Event&) override {}

    void embed(std::span<const std::int32_t> ids, ConstTensorView table, TensorView out) override;
    void rms_norm(ConstTensorView x, ConstTensorView weight, float eps, TensorView out) override;
    void linear(ConstTensorView x, ConstTensorView weight, ConstTensorView bias, TensorView out) override;
    void add(ConstTensorView x, TensorView accumulated) override;
    void rope(TensorView x, const Sequences& sequences, ConstTensorView cos_sin) override;
    void attention(ConstTensorView q, ConstTensorView k, ConstTensorView v, const Sequences& sequences,
                   const AttentionOptions& options, TensorView out) override;
    void silu_mul(ConstTensorView gate, ConstTensorView up, TensorView out) override;
    std::vector<double> cross_entropy(ConstTensorView logits, std::span<const std::int32_t> targets) override;
    std::vector<LogitDistance> logit_distances(ConstTensorView reference, ConstTensorView logits) override;

    void accumulate_hessian(ConstTensorView x, TensorView h) override;
    std::vector<float> read_diagonal(ConstTensorView h) override;
    void write_diagonal(std::span<const float> values, TensorView h) override;
    void add_fixed_point(ConstTensorView h, std::span<const std::int32_t> exponents, TensorView sum) override;
    void from_fixed_point(ConstTensorView sum, std::span<const std::int32_t> exponents, double factor,
                          TensorView h) override;
    void permute_symmetric(ConstTensorView source, std::span<const std::int32_t> order,
                           TensorView h) override;

    void accumulate_cross(TensorView original, ConstTensorView x, TensorView d) override;
    double largest_fixed_point(ConstTensorView d, std::span<const std::int32_t> exponents) override;
    void add_fixed_point_full(ConstTensorView d, std::span<const std::int32_t> exponents,
                              TensorView sum) override;
    void from_fixed_point_full(ConstTensorView sum, std::span<const std::int32_t> exponents, double factor,
                               TensorView d) override;
    void propagate_error(ConstTensorView weights, ConstTensorView d, ConstTensorView factor,
                         std::span<const std::int32_t> order, float alpha, TensorView target) override;
    std::size_t propagate_workspace(std::int64_t rows, std::int64_t columns) const override;

    std::size_t factor_workspace(std::int64_t) const override { return 0; }  // tiles, in place
    std::size_t solve_workspace(std::int64_t rows, std::int64_t columns,
                                const QuantizationGrid& grid) const override;
    std::size_t refine_workspace(std::int64_t rows, std::int64_t columns,
                                 const QuantizationGrid& grid) const override;
    [[nodiscard]] bool reverse_cholesky(TensorView h) override;
    void permute_columns(ConstTensorView x, std::span<const std::int32_t> order, TensorView out) override;
    void zero_columns(std::span<const std::int32_t> columns, TensorView x) override;
    std::vector<double> squared_distance(ConstTensorView a, ConstTensorView b) override;
    void gptq_solve(ConstTensorView weights, ConstTensorView factor, const QuantizationGrid& grid,
                    QuantizedViews out, TensorView loss) override;
    void choose_grids(ConstTensorView weights, std::span<const float> importance,
                      const QuantizationGrid& grid, QuantizedViews out) override;
    void gptq_solve_static(ConstTensorView weights, ConstTensorView factor,
                           std::span<const std::int32_t> groups, const QuantizationGrid& grid,
                           QuantizedViews quantized, TensorView loss) override;
    void dequantize(ConstQuantizedViews quantized, std::span<const std::int32_t> g_idx,
                    TensorView out) override;
    void mirror_triangle(TensorView h) override;
    void quadratic_loss(ConstTensorView weights, ConstTensorView hessian, const QuantizationGrid& grid,
                        QuantizedViews quantized, TensorView loss) override;
    void sweep_codes(ConstTensorView weights, ConstTensorView hessian, const QuantizationGrid& grid,
                     QuantizedViews quantized) override;
    void refit_scales(ConstTensorView weights, ConstTensorView hessian, const QuantizationGrid& grid,
                      QuantizedViews quantized) override;
    void pack(ConstTensorView codes, int bits, TensorView packed) override;
    void unpack(ConstTensorView packed, int bits, TensorView codes) override;
};

}  // namespace quantmill
