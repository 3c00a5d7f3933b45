#pragma once

#include <cstdlib>
#include <cstring>

#include "kernels/backend.h"

namespace quantmill {

// The memory of a backend and nothing else, for tests of what moves tensors. As a device its pointers
// lie far from any host memory, so that dereferencing one crashes.
class MemoryBackend final : public Backend {
public:
    explicit MemoryBackend(bool host, std::size_t free = std::size_t{1} << 30U) : host_(host), free_(free) {}

    std::string name() const override { return "memory"; }
    std::string description() const override { return "memory"; }
    DType activation_dtype() const override { return DType::f32; }
    std::size_t free_memory(int ranks) const override { return free_ / static_cast<std::size_t>(ranks); }
    bool host_memory() const override { return host_; }
    void* allocate(std::size_t bytes, const std::string&) override {
        return moved(std::malloc(bytes == 0 ? 1 : bytes), offset());
    }
    void deallocate(void* memory) noexcept override { std::free(moved(memory, -offset())); }
    void copy_from_host(const void* source, TensorView destination) override {
        if (destination.empty()) return;
        std::memcpy(moved(destination.bytes(), -offset()), source, destination.size_bytes());
    }
    void copy_to_host(ConstTensorView source, void* destination) override {
        if (source.empty()) return;
        const void* memory = moved(const_cast<std::byte*>(source.bytes()), -offset());
        std::memcpy(destination, memory, source.size_bytes());
    }
    void synchronize() override {}
    std::size_t peak_memory() const override { return 0; }
    std::int64_t micro_batch_tokens() const override { return 1; }
    void* allocate_host(std::size_t bytes, const std::string&) override { return std::malloc(bytes); }
    void deallocate_host(void* memory, std::size_t) noexcept override { std::free(memory); }
    std::unique_ptr<CopyLane> make_copy_lane() override { unused(); }
    EventPtr record() override { unused(); }
    void after(const Event&) override { unused(); }

    void copy(ConstTensorView, TensorView) override { unused(); }
    void zero(TensorView) override { unused(); }
    void convert(ConstTensorView, TensorView) override { unused(); }
    void embed(std::span<const std::int32_t>, ConstTensorView, TensorView) override { unused(); }
    void rms_norm(ConstTensorView, ConstTensorView, float, TensorView) override { unused(); }
    void linear(ConstTensorView, ConstTensorView, ConstTensorView, TensorView) override { unused(); }
    void add(ConstTensorView, TensorView) override { unused(); }
    void rope(TensorView, const Sequences&, ConstTensorView) override { unused(); }
    void attention(ConstTensorView, ConstTensorView, ConstTensorView, const Sequences&,
                   const AttentionOptions&, TensorView) override {
        unused();
    }
    void silu_mul(ConstTensorView, ConstTensorView, TensorView) override { unused(); }
    std::vector<double> cross_entropy(ConstTensorView, std::span<const std::int32_t>) override { unused(); }
    std::vector<LogitDistance> logit_distances(ConstTensorView, ConstTensorView) override { unused(); }
    void accumulate_hessian(ConstTensorView, TensorView) override { unused(); }
    std::vector<float> read_diagonal(ConstTensorView) override { unused(); }
    void write_diagonal(std::span<const float>, TensorView) override { unused(); }
    void add_fixed_point(ConstTensorView, std::span<const std::int32_t>, TensorView) override { unused(); }
    void from_fixed_point(ConstTensorView, std::span<const std::int32_t>, double, TensorView) override {
        unused();
    }
    void permute_symmetric(ConstTensorView, std::span<const std::int32_t>, TensorView) override { unused(); }
    void accumulate_cross(TensorView, ConstTensorView, TensorView) override { unused(); }
    double largest_fixed_point(ConstTensorView, std::span<const std::int32_t>) override { unused(); }
    void add_fixed_point_full(ConstTensorView, std::span<const std::int32_t>, TensorView) override {
        unused();
    }
    void from_fixed_point_full(ConstTensorView, std::span<const std::int32_t>, double, TensorView) override {
        unused();
    }
    void propagate_error(ConstTensorView, ConstTensorView, ConstTensorView, std::span<const std::int32_t>,
                         float, TensorView) override {
        unused();
    }
    std::size_t propagate_workspace(std::int64_t, std::int64_t) const override { return 0; }
    std::size_t factor_workspace(std::int64_t) const override { return 0; }
    std::size_t solve_workspace(std::int64_t, std::int64_t, const QuantizationGrid&) const override {
        return 0;
    }
    std::size_t refine_workspace(std::int64_t, std::int64_t, const QuantizationGrid&) const override {
        return 0;
    }
    bool reverse_cholesky(TensorView) override { unused(); }
    void permute_columns(ConstTensorView, std::span<const std::int32_t>, TensorView) override { unused(); }
    void zero_columns(std::span<const std::int32_t>, TensorView) override { unused(); }
    std::vector<double> squared_distance(ConstTensorView, ConstTensorView) override { unused(); }
    void gptq_solve(ConstTensorView, ConstTensorView, const QuantizationGrid&, QuantizedViews,
                    TensorView) override {
        unused();
    }
    void choose_grids(ConstTensorView, std::span<const float>, const QuantizationGrid&,
                      QuantizedViews) override {
        unused();
    }
    void gptq_solve_static(ConstTensorView, ConstTensorView, std::span<const std::int32_t>,
                           const QuantizationGrid&, QuantizedViews, TensorView) override {
        unused();
    }
    void dequantize(ConstQuantizedViews, std::span<const std::int32_t>, TensorView) override { unused(); }
    void mirror_triangle(TensorView) override { unused(); }
    void quadratic_loss(ConstTensorView, ConstTensorView, const QuantizationGrid&, QuantizedViews,
                        TensorView) override {
        unused();
    }
    void sweep_codes(ConstTensorView, ConstTensorView, const QuantizationGrid&, QuantizedViews) override {
        unused();
    }
    void refit_scales(ConstTensorView, ConstTensorView, const QuantizationGrid&, QuantizedViews) override {
        unused();
    }
    void pack(ConstTensorView, int, TensorView) override { unused(); }
    void unpack(ConstTensorView, int, TensorView) override { unused(); }

private:
    std::ptrdiff_t offset() const { return host_ ? 0 : std::ptrdiff_t{1} << 50U; }
    static void* moved(void* memory, std::ptrdiff_t distance) {
        return reinterpret_cast<void*>(reinterpret_cast<std::intptr_t>(memory) + distance);
    }
    [[noreturn]] static void unused() { throw InternalError("moving tensors computes nothing"); }

    bool host_;
    std::size_t free_;
};

}  // namespace quantmill
