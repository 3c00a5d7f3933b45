#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/pinned_memory.h"

namespace quantmill {

// One GPU: bf16 activations, fp32 accumulation. All operations go to one stream (copy lanes have their own),
// memory comes from a stream-ordered pool, and only what returns values to the host waits for the device.
// One file an operation family: forward, hessian, cholesky, gptq_solve, refine (.cpp: which kernels and
// products; .cu: the kernels).
class CudaBackend final : public Backend {
public:
    static int visible_devices();
    // Takes device local_rank modulo the number of visible devices.
    // `memory_limit`: bytes of device memory that may be taken; nothing: what is free.
    explicit CudaBackend(int local_rank, std::optional<std::size_t> memory_limit = {});
    ~CudaBackend() override;

    cudaStream_t stream() const { return stream_; }
    int device() const { return device_; }

    std::string name() const override { return "cuda"; }
    std::string description() const override;
    DType activation_dtype() const override { return DType::bf16; }
    std::size_t free_memory(int ranks) const override;
    std::size_t peak_memory() const override;
    bool host_memory() const override { return false; }
    std::string unique_device() const override;
    std::int64_t micro_batch_tokens() const override { return 16384; }

    void* allocate(std::size_t bytes, const std::string& what) override;
    void deallocate(void* memory) noexcept override;
    void copy_from_host(const void* source, TensorView destination) override;
    void copy_to_host(ConstTensorView source, void* destination) override;
    void copy(ConstTensorView source, TensorView destination) override;
    void zero(TensorView tensor) override;
    void convert(ConstTensorView source, TensorView destination) override;
    void synchronize() override;

    void* allocate_host(std::size_t bytes, const std::string& what) override;
    void deallocate_host(void* memory, std::size_t bytes) noexcept override;
    std::unique_ptr<CopyLane> make_copy_lane() override;
    EventPtr record() override;
    void after(const Event& event) override;

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

    std::size_t factor_workspace(std::int64_t columns) const override;
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

private:
    struct Allocation {
        std::size_t bytes;
        std::string what;
    };

    // A small array of the host as a tensor; the host may change or free its copy at once.
    template <class T>
    Tensor upload(std::span<const T> values, const std::string& what) {
        Tensor tensor = empty({static_cast<std::int64_t>(values.size())}, dtype_of<T>, what);
        upload_bytes(values.data(), tensor);
        return tensor;
    }
    void upload_bytes(const void* source, TensorView destination);
    template <class T>
    std::vector<T> download(ConstTensorView tensor) {
        std::vector<T> values(static_cast<std::size_t>(tensor.shape().count()));
        copy_to_host(tensor, values.data());
        return values;
    }
    [[noreturn]] void out_of_memory(std::size_t bytes, const std::string& what) const;

    std::optional<std::size_t> memory_limit_;
    int device_ = 0;
    cudaStream_t stream_ = nullptr;
    cudaMemPool_t pool_ = nullptr;
    cuda::PinnedMemory pinned_;
    std::unordered_map<void*, Allocation> allocations_;
    std::unique_ptr<cuda::Gemm> gemm_;
};

}  // namespace quantmill
