#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/copy_lane.h"
#include "kernels/scale_search.h"
#include "kernels/tensor.h"

namespace quantmill {

// Where sequences begin in a batch whose tokens are laid one after the other: sequence i owns
// tokens [offsets[i], offsets[i + 1]).
struct Sequences {
    std::vector<std::int32_t> offsets{0};
    std::int64_t count() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
    std::int64_t tokens() const { return offsets.back(); }
};

struct AttentionOptions {
    float scale = 1.0F;       // multiplies q·k, usually 1/sqrt(head_dim)
    std::int64_t window = 0;  // a token sees itself and the window - 1 before it; 0: all before it
};

// What a model predicts for a token, compared with what a reference predicts.
struct LogitDistance {
    double divergence = 0.0;  // Kullback-Leibler, Σ p_ref log(p_ref / p), in nats
    bool same_top = false;    // both are highest at the same token; of equals, the first counts
};

// The integer grid of a quantized linear. Codes are 0 … 2^bits − 1; weight = scale · (code − zero).
struct QuantizationGrid {
    int bits = 4;
    std::int64_t group_size = 128;  // columns that share a scale; at least 1, at most the width
    bool sym = true;                // zero = 2^(bits−1), scale = 2·absmax/(2^bits − 1)
    ScaleSearch search = ScaleSearch::minmax;
    bool signed_scales = false;  // sym: a scale may be negative
    bool bf16_scales = false;    // scales are such that fp16 and bf16 hold them exactly
    std::int64_t groups(std::int64_t columns) const { return (columns + group_size - 1) / group_size; }
    int max_code() const { return (1 << bits) - 1; }
    friend bool operator==(const QuantizationGrid&, const QuantizationGrid&) = default;
};

// gptq_solve works on blocks of this many rows: callers that split a tensor's rows begin their pieces at
// its multiples and get the same bytes as an unsplit call.
inline constexpr std::int64_t kSolveRowBlock = 64;

// Groups of a row whose scales are fitted together: a system of that order for each row.
inline constexpr std::int64_t kRefitWindow = 32;

// Where a solve or a decode puts or finds a quantized linear of R rows, C columns, G groups.
template <class View>
struct BasicQuantizedViews {
    View codes;   // u8  [R, C]
    View scales;  // f16 [R, G]
    View zeros;   // u8  [R, G]
};
using QuantizedViews = BasicQuantizedViews<TensorView>;
using ConstQuantizedViews = BasicQuantizedViews<ConstTensorView>;

// Memory of one device and the operations that quantization needs on it. Views must belong to the
// backend. All numerical shapes come from the job, and an element of a result depends only on its
// operands, never on the number of threads or on which other rows share the call (docs/design.md,
// "The same bytes"). Shapes that do not fit throw InternalError; a failed device call throws
// InfrastructureError with the call, its arguments and the device.
class Backend {
public:
    Backend() = default;
    virtual ~Backend() = default;
    Backend(const Backend&) = delete;
    Backend& operator=(const Backend&) = delete;

    virtual std::string name() const = 0;         // "cpu" or "cuda"
    virtual std::string description() const = 0;  // hardware and libraries, for the report
    virtual DType activation_dtype() const = 0;   // f32 on the CPU, bf16 on GPUs
    virtual int threads() const { return 1; }     // host threads it computes with
    // Bytes that each of `ranks` that share the memory may still allocate, within compute.device_memory,
    // which is a rank's own.
    virtual std::size_t free_memory(int ranks) const = 0;
    virtual std::size_t peak_memory() const = 0;  // the most bytes that were taken at a time so far
    virtual bool host_memory() const = 0;         // whether the host may dereference views
    // The same for all processes that use this device, and for no other device; empty on the host.
    virtual std::string unique_device() const { return {}; }
    // Tokens that one call of the forward operations should get, enough to keep the device busy. A numerical
    // shape, so it depends on the kind of backend only.
    virtual std::int64_t micro_batch_tokens() const = 0;

    // `what` names the allocation in an out-of-memory error. Zero bytes are allowed.
    virtual void* allocate(std::size_t bytes, const std::string& what) = 0;
    virtual void deallocate(void* memory) noexcept = 0;
    Tensor empty(Shape shape, DType dtype, const std::string& what) { return {*this, shape, dtype, what}; }

    // Host memory of source.size_bytes() / destination.size_bytes() bytes.
    virtual void copy_from_host(const void* source, TensorView destination) = 0;
    virtual void copy_to_host(ConstTensorView source, void* destination) = 0;
    virtual void copy(ConstTensorView source, TensorView destination) = 0;  // same dtype and count
    virtual void zero(TensorView tensor) = 0;
    // Converts between f32, f16 and bf16, rounding to nearest even.
    virtual void convert(ConstTensorView source, TensorView destination) = 0;
    virtual void synchronize() = 0;

    // Copies that run beside the operations (kernels/copy_lane.h). allocate_host may be called by any thread.
    virtual void* allocate_host(std::size_t bytes, const std::string& what) = 0;
    virtual void deallocate_host(void* memory, std::size_t bytes) noexcept = 0;
    HostBuffer host_buffer(std::size_t bytes, const std::string& what) { return {*this, bytes, what}; }
    virtual std::unique_ptr<CopyLane> make_copy_lane() = 0;
    virtual EventPtr record() = 0;
    virtual void after(const Event& event) = 0;  // later operations begin when it has passed

    // --- Forward. x, out: activation dtype unless said otherwise; T tokens. ---

    // out[t] = table[ids[t]]; ids is host memory, table [V, C] any float dtype, out [T, C].
    virtual void embed(std::span<const std::int32_t> ids, ConstTensorView table, TensorView out) = 0;
    // out = x · rsqrt(mean(x²) + eps) · weight, per row; x, out [T, C], weight f32 [C].
    virtual void rms_norm(ConstTensorView x, ConstTensorView weight, float eps, TensorView out) = 0;
    // out = x · weightᵀ + bias; x [T, C], weight [R, C], bias f32 [R] or empty,
    // out [T, R] (activation dtype, or f32 for logits).
    virtual void linear(ConstTensorView x, ConstTensorView weight, ConstTensorView bias, TensorView out) = 0;
    virtual void add(ConstTensorView x, TensorView accumulated) = 0;  // accumulated += x
    // Rotates halves (x[i], x[i + D/2]) of each head in place; x [T, H, D], positions restart with
    // each sequence; cos_sin f32 [2, positions, D/2] holds cosines, then sines.
    virtual void rope(TensorView x, const Sequences& sequences, ConstTensorView cos_sin) = 0;
    // Causal grouped-query attention inside each sequence; memory does not grow with T².
    // q, out [T, H, D], k, v [T, K, D], K divides H.
    virtual void attention(ConstTensorView q, ConstTensorView k, ConstTensorView v,
                           const Sequences& sequences, const AttentionOptions& options, TensorView out) = 0;
    // out = silu(gate) · up, element by element.
    virtual void silu_mul(ConstTensorView gate, ConstTensorView up, TensorView out) = 0;
    // Returns −log softmax(logits[t])[targets[t]] in double precision; logits f32 [T, V].
    virtual std::vector<double> cross_entropy(ConstTensorView logits,
                                              std::span<const std::int32_t> targets) = 0;
    // How far each row of logits is from the reference's, in double precision; both f32 [T, V].
    virtual std::vector<LogitDistance> logit_distances(ConstTensorView reference, ConstTensorView logits) = 0;

    // --- Hessians. ---

    // Lower triangle of h += xᵀ·x; x [T, C] activation dtype, h f32 [C, C].
    virtual void accumulate_hessian(ConstTensorView x, TensorView h) = 0;
    virtual std::vector<float> read_diagonal(ConstTensorView h) = 0;
    virtual void write_diagonal(std::span<const float> values, TensorView h) = 0;
    // sum[i(i+1)/2 + j] += round(h[i, j] · 2^(exponents[i] + exponents[j])), j <= i: fixed point makes
    // the sum over shards exact, so it does not depend on their order. sum i64 [C(C+1)/2].
    virtual void add_fixed_point(ConstTensorView h, std::span<const std::int32_t> exponents,
                                 TensorView sum) = 0;
    // Lower triangle of h[i, j] = factor · sum[i(i+1)/2 + j] · 2^−(exponents[i] + exponents[j]).
    virtual void from_fixed_point(ConstTensorView sum, std::span<const std::int32_t> exponents, double factor,
                                  TensorView h) = 0;
    // h[i, j] of the result = source[max(p[i], p[j]), min(p[i], p[j])]: rows and columns of a symmetric
    // matrix, given and returned as a lower triangle, in the order p.
    virtual void permute_symmetric(ConstTensorView source, std::span<const std::int32_t> order,
                                   TensorView h) = 0;

    // --- Error propagation (docs/quality.md): d is not symmetric, all of it counts. ---

    // original −= x, rounded to the activation dtype, then d += originalᵀ·x; original, x [T, C] activation
    // dtype, d f32 [C, C].
    virtual void accumulate_cross(TensorView original, ConstTensorView x, TensorView d) = 0;
    // Greatest |d[i, j]| · 2^(exponents[i] + exponents[j]); infinite when a value is not finite.
    virtual double largest_fixed_point(ConstTensorView d, std::span<const std::int32_t> exponents) = 0;
    // As add_fixed_point and from_fixed_point, for all elements; sum i64 [C, C].
    virtual void add_fixed_point_full(ConstTensorView d, std::span<const std::int32_t> exponents,
                                      TensorView sum) = 0;
    virtual void from_fixed_point_full(ConstTensorView sum, std::span<const std::int32_t> exponents,
                                       double factor, TensorView d) = 0;
    // target = weights + alpha · weights · d · H⁻¹; weights, target f32 [R, C], d f32 [C, C]. factor: of
    // reverse_cholesky for H with rows and columns in `order` (empty: as they are). Rows split as in
    // gptq_solve.
    virtual void propagate_error(ConstTensorView weights, ConstTensorView d, ConstTensorView factor,
                                 std::span<const std::int32_t> order, float alpha, TensorView target) = 0;
    // Bytes that it takes beside its operands, for plans.
    virtual std::size_t propagate_workspace(std::int64_t rows, std::int64_t columns) const = 0;

    // --- GPTQ (docs/algorithm.md; Babai's nearest plane, arXiv 2507.18553). ---

    // Bytes that reverse_cholesky, gptq_solve and what follows it take beside their operands, for plans.
    virtual std::size_t factor_workspace(std::int64_t columns) const = 0;
    virtual std::size_t solve_workspace(std::int64_t rows, std::int64_t columns,
                                        const QuantizationGrid& grid) const = 0;
    virtual std::size_t refine_workspace(std::int64_t rows, std::int64_t columns,
                                         const QuantizationGrid& grid) const = 0;
    // Factors H = R·Rᵀ, R upper, from the lower triangle of h, in place: afterwards
    // h[i, j] = R_ij / R_jj for i < j and h[j, j] = R_jj; the lower triangle is undefined.
    // Returns false when H is not numerically positive definite (h is then undefined).
    [[nodiscard]] virtual bool reverse_cholesky(TensorView h) = 0;
    // out[r, c] = x[r, order[c]]: columns of a matrix (f32, f16 or u8) in the given order.
    virtual void permute_columns(ConstTensorView x, std::span<const std::int32_t> order, TensorView out) = 0;
    virtual void zero_columns(std::span<const std::int32_t> columns, TensorView x) = 0;  // x f32 [R, C]
    // Per row Σ_c (a[r, c] − b[r, c])² in double precision; a, b f32 [R, C].
    virtual std::vector<double> squared_distance(ConstTensorView a, ConstTensorView b) = 0;
    // Quantizes rows of weights f32 [R, C] with the factor [C, C] of reverse_cholesky; writes codes,
    // scales and zeros and, per row, loss f32 [R] = Σ_j (target_j − q_j)² R_jj². Group parameters come
    // from the updated weights S_g and are rounded to fp16 before use.
    virtual void gptq_solve(ConstTensorView weights, ConstTensorView factor, const QuantizationGrid& grid,
                            QuantizedViews out, TensorView loss) = 0;
    // Scales and zeros of contiguous groups from the weights as they are; importance[c] = R_cc² weighs column
    // c in a search by Hessian (empty: all alike). Writes out.scales and out.zeros; out.codes may be empty.
    virtual void choose_grids(ConstTensorView weights, std::span<const float> importance,
                              const QuantizationGrid& grid, QuantizedViews out) = 0;
    // gptq_solve with scales and zeros that are given; column j of weights and codes belongs to groups[j].
    virtual void gptq_solve_static(ConstTensorView weights, ConstTensorView factor,
                                   std::span<const std::int32_t> groups, const QuantizationGrid& grid,
                                   QuantizedViews quantized, TensorView loss) = 0;
    // out[r, c] = scales[r, g] · (codes[r, c] − zeros[r, g]), g = g_idx[c]; out [R, C] f32 or activation
    // dtype.
    virtual void dequantize(ConstQuantizedViews quantized, std::span<const std::int32_t> g_idx,
                            TensorView out) = 0;
    // --- After the solve (docs/quality.md). hessian: the damped H f32 [C, C], both triangles; weights f32
    // [R, C]; column c belongs to group c / group_size. Each never raises (w − q) H (w − q)ᵀ of a row but for
    // rounding in fp32. ---

    // Copies the lower triangle of h to the upper one.
    virtual void mirror_triangle(TensorView h) = 0;
    // Per row (w − q) H (w − q)ᵀ; loss f32 [R].
    virtual void quadratic_loss(ConstTensorView weights, ConstTensorView hessian,
                                const QuantizationGrid& grid, QuantizedViews quantized, TensorView loss) = 0;
    // One sweep of coordinate descent: in order of columns each code moves to where the loss is least with
    // all others as they are. Scales and zeros stay.
    virtual void sweep_codes(ConstTensorView weights, ConstTensorView hessian, const QuantizationGrid& grid,
                             QuantizedViews quantized) = 0;
    // The scales with the least loss for the codes as they are, kRefitWindow groups of a row at a time,
    // rounded as the grid says; those of a window stay where rounding would make it worse.
    virtual void refit_scales(ConstTensorView weights, ConstTensorView hessian, const QuantizationGrid& grid,
                              QuantizedViews quantized) = 0;

    // GPTQ's qweight: 32 consecutive codes of a row fill `bits` words as one LSB-first bit stream.
    // codes u8 [R, C] <-> packed i32 [C·bits/32, R]; C is a multiple of 32.
    virtual void pack(ConstTensorView codes, int bits, TensorView packed) = 0;
    virtual void unpack(ConstTensorView packed, int bits, TensorView codes) = 0;
};

}  // namespace quantmill
