#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/scale_search.h"

// Our kernels, each behind a function that checks the launch. Pointers are device memory, matrices
// row-major; bf16 where nothing else is said. kernels/backend.h says what each operation does.
namespace quantmill::cuda {

// --- elementwise.cu ---
void convert(const void* source, DType from, void* destination, DType to, std::int64_t count,
             cudaStream_t stream);
void embed(const std::int32_t* ids, const void* table, DType dtype, std::int64_t tokens, std::int64_t columns,
           void* out, cudaStream_t stream);
void rms_norm(const void* x, const float* weight, float eps, std::int64_t rows, std::int64_t columns,
              void* out, cudaStream_t stream);
// out[t, r] += bias[r]; out is bf16 or f32.
void add_bias(const float* bias, std::int64_t rows, std::int64_t columns, DType dtype, void* out,
              cudaStream_t stream);
void add(const void* x, void* accumulated, std::int64_t count, cudaStream_t stream);
void rope(void* x, const std::int32_t* offsets, int sequences, std::int64_t tokens, int heads, int head_dim,
          const float* cos_sin, std::int64_t positions, cudaStream_t stream);
void silu_mul(const void* gate, const void* up, void* out, std::int64_t count, cudaStream_t stream);
void cross_entropy(const float* logits, const std::int32_t* targets, std::int64_t rows, std::int64_t columns,
                   double* out, cudaStream_t stream);
// same_top: 1 or 0.
void logit_distances(const float* reference, const float* logits, std::int64_t rows, std::int64_t columns,
                     double* divergence, double* same_top, cudaStream_t stream);
void permute_columns(const void* x, DType dtype, const std::int32_t* order, std::int64_t rows,
                     std::int64_t columns, void* out, cudaStream_t stream);

void zero_columns(const std::int32_t* which, std::int64_t count, std::int64_t rows, std::int64_t columns,
                  float* x, cudaStream_t stream);
void squared_distance(const float* a, const float* b, std::int64_t rows, std::int64_t columns, double* out,
                      cudaStream_t stream);

// --- attention.cu ---
inline constexpr int kWidestHead = 256;
struct AttentionShape {
    int sequences, longest, heads, kv_heads, head_dim;
    float scale;
    int window;  // INT_MAX when all earlier tokens are seen
};
void attention(const AttentionShape& shape, const void* q, const void* k, const void* v,
               const std::int32_t* offsets, void* out, cudaStream_t stream);

// --- hessian.cu ---
void read_diagonal(const float* h, std::int64_t n, float* diagonal, cudaStream_t stream);
void write_diagonal(const float* diagonal, std::int64_t n, float* h, cudaStream_t stream);
// *misfits becomes positive when a value is not finite or leaves the range.
void add_fixed_point(const float* h, const std::int32_t* exponents, std::int64_t n, std::int64_t* sum,
                     int* misfits, cudaStream_t stream);
void from_fixed_point(const std::int64_t* sum, const std::int32_t* exponents, double factor, std::int64_t n,
                      float* h, cudaStream_t stream);
void permute_symmetric(const float* source, const std::int32_t* order, std::int64_t n, float* h,
                       cudaStream_t stream);

// Up to this width factors and solves multiply in fp32, which costs nothing there and keeps their codes those
// of the CPU; wider ones take tensor cores with bf16 operands in two parts (bench/RESULTS.md).
inline constexpr std::int64_t kExactColumns = 2048;

// --- cholesky.cu ---
// H = R·Rᵀ of one diagonal block of at most kCholeskyBlock columns, in place as Rᵀ in the lower
// triangle of block [n, n] (leading dimension ld); inverse [kCholeskyBlock, kCholeskyBlock] gets
// R⁻ᵀ. Sets *failed when a pivot is not positive.
inline constexpr int kCholeskyBlock = 128;
void cholesky_block(float* block, int n, std::int64_t ld, float* inverse, int* failed, cudaStream_t stream);
// rows [n, columns] = inverseᵀ · rows, and each element in two bf16 parts, high + low, that carry 16 of
// its bits: left[column, ld_parts] gets 128 times high, high, low part and right high, low, high, so
// that left · rightᵀ is the product of the rows but for low · low. n <= kCholeskyBlock, the rest is zero.
// Without left and right there are no parts.
void cholesky_panel(float* rows, const float* inverse, int n, std::int64_t columns, std::int64_t ld,
                    void* left, void* right, std::int64_t ld_parts, cudaStream_t stream);
// h[i, j] = h[j, i] / h[j, j] for i < j.
void cholesky_finish(float* h, std::int64_t n, cudaStream_t stream);

// --- error_propagation.cu ---
void subtract(const void* x, std::int64_t count, void* from, cudaStream_t stream);
// largest: a double that is not negative; it grows to the greatest |d[i, j]| · 2^(exponents[i] +
// exponents[j]).
void largest_fixed_point(const float* d, const std::int32_t* exponents, std::int64_t n, void* largest,
                         cudaStream_t stream);
void add_fixed_point_full(const float* d, const std::int32_t* exponents, std::int64_t n, std::int64_t* sum,
                          int* misfits, cudaStream_t stream);
void from_fixed_point_full(const std::int64_t* sum, const std::int32_t* exponents, double factor,
                           std::int64_t n, float* d, cudaStream_t stream);
// Three bf16 parts of each element of source [rows, columns] (leading dimension ld) at out[row · ld_out +
// column], `step` apart.
enum class SplitOrder : std::uint8_t { high_high_low, high_low_high };
void split(const float* source, std::int64_t rows, std::int64_t columns, std::int64_t ld, SplitOrder order,
           std::int64_t step, std::int64_t ld_out, void* out, cudaStream_t stream);
// Inverses of the diagonal blocks of U, the unit upper triangle that stands above the factor's diagonal:
// inverse [blocks][kPropagateBlock][kPropagateBlock], with the identity where the last block ends early.
inline constexpr int kPropagateBlock = 128;
void invert_blocks(const float* factor, std::int64_t n, float* inverse, cudaStream_t stream);
// x[r, j] /= factor[j, j]².
void divide_columns(const float* factor, std::int64_t rows, std::int64_t columns, float* x,
                    cudaStream_t stream);
// target[r, p] = weights[r, p] + alpha · moved[r, j], p = order[j], or j without an order.
void add_propagated(const float* weights, const float* moved, const std::int32_t* order, std::int64_t rows,
                    std::int64_t columns, float alpha, float* target, cudaStream_t stream);

// --- gptq_solve.cu, scale_search.cu ---
inline constexpr int kSolveBlock = 128;             // columns that one kernel quantizes
inline constexpr int kSolveSlot = 3 * kSolveBlock;  // bf16 elements that stand for them in a product
struct SolveGrid {
    int bits;
    std::int64_t group_size;
    bool sym;
    ScaleSearch search;
    bool signed_scales, bf16_scales;
};
// Which columns a slot's 128 places hold. A slot has `width` columns; `per_run` slots make a run of `run`
// columns, whose last slot may be short. Pieces of `piece` columns begin at multiples of `padded` places.
struct SolveSlots {
    std::int64_t width, run, per_run;
    int piece, padded;
    constexpr std::int64_t first(std::int64_t slot) const {
        return slot / per_run * run + slot % per_run * width;
    }
    constexpr std::int64_t of(std::int64_t column) const {  // the first column of a slot
        return column / run * per_run + column % run / width;
    }
    // The place's column in the slot, or -1.
    constexpr int column(int place) const {
        return place % padded < piece ? place / padded * piece + place % padded : -1;
    }
};
// What all blocks of a solve share: R rows, C columns, G groups.
struct SolveRows {
    const float* weights;  // [R, C]
    const float* factor;   // [C, C]: C_ij above the diagonal, R_jj on it
    void* errors;  // W − Q: bf16 [R, ld_errors], slots of 128 times high, high, low part; exact: f32 [R, C]
    std::uint8_t* codes;        // [R, C]
    void* scales;               // f16 [R, G]
    std::uint8_t* zeros;        // [R, G]
    float* loss;                // [R]
    const std::int32_t* given;  // [C]: groups of columns whose scales and zeros are given; or null
    std::int64_t rows, columns, groups, ld_errors;
    bool exact;  // fp32 products
    SolveGrid grid;
    SolveSlots slots;
};
struct SolveBlock {
    std::int64_t first;  // column
    std::int64_t slot;
    int width;           // columns
    const void* factor;  // bf16: its columns' rows of factor_slots, at its slot; not used where exact
    std::int64_t ld_factor;
    const float* pushes;  // [R, ld_pushes]: what the errors of all columns before it add to its targets
    std::int64_t ld_pushes;
    bool grid_known;  // scales and zeros of its group are stored already
};
void solve_block(const SolveRows& rows, const SolveBlock& block, cudaStream_t stream);
// For groups wider than a block: ranges float2 [R] get the least and greatest updated weight of the
// group's blocks so far, errors get −z (gptq_solve.cpp).
void continue_block(const SolveRows& rows, const SolveBlock& block, void* ranges, cudaStream_t stream);
// Scales and zeros of groups [first_group, first_group + count): from the original weights or, with the
// ranges of the one group, from what continue_block left. importance [C] weighs columns; null: all alike.
void choose_grids(const SolveRows& rows, std::int64_t first_group, std::int64_t count, const void* ranges,
                  const float* importance, cudaStream_t stream);
void importance(const float* factor, std::int64_t columns, float* out, cudaStream_t stream);  // R_jj²
// Columns [first, last) of the factor [columns, columns] as rows of out, bf16 [last − first, ld]: `count`
// slots, each 128 times high, low, high part; zero on and below the diagonal.
void factor_slots(const float* factor, std::int64_t columns, const SolveSlots& slots, std::int64_t count,
                  std::int64_t first, std::int64_t last, void* out, std::int64_t ld, cudaStream_t stream);

// --- refine.cu ---
inline constexpr int kRefineBlock = 128;  // columns that one kernel sweeps
inline constexpr int kRefitGroups = 32;   // groups of a row whose scales are fitted together
// Quantized rows and the weights that they stand for: R rows, C columns, G groups.
struct RefineRows {
    const float* weights;       // [R, C]
    std::uint8_t* codes;        // [R, C]
    void* scales;               // f16 [R, G]
    const std::uint8_t* zeros;  // [R, G]
    std::int64_t rows, columns, groups, group_size;
    float max_code;
};
void mirror_triangle(float* h, std::int64_t n, cudaStream_t stream);
// errors, steps [R, C] = weights − scales · steps, codes − zeros; steps may be null.
void refine_errors(const RefineRows& rows, float* errors, float* steps, cudaStream_t stream);
// sums[row] += Σ_j errors[row, j] · products[row, j], j < width; products [R, width].
void add_losses(const float* errors, std::int64_t ld_errors, const float* products, std::int64_t width,
                std::int64_t rows, double* sums, cudaStream_t stream);
void store_losses(const double* sums, std::int64_t rows, float* loss, cudaStream_t stream);
// Sweeps columns [first, first + width); gradients [R, kRefineBlock] = errors · H of these columns.
void sweep_block(const RefineRows& rows, const float* hessian, std::int64_t first, int width,
                 const float* gradients, float* errors, cudaStream_t stream);
// out[row · row_step + g] = Σ_j steps[row, j] · products[row, j − begin] over group g of columns [begin,
// end).
void dot_groups(const RefineRows& rows, const float* steps, std::int64_t begin, std::int64_t end,
                const float* products, std::int64_t groups, double* out, std::int64_t row_step,
                cudaStream_t stream);
// Solves a system of `count` scales a row from group `first` on; a [R, 32, 32], b [R, 32].
void move_scales(const RefineRows& rows, std::int64_t first, int count, const double* a, const double* b,
                 bool bf16_scales, cudaStream_t stream);

// --- pack.cu ---
void dequantize(const std::uint8_t* codes, const void* scales, const std::uint8_t* zeros,
                const std::int32_t* g_idx, std::int64_t rows, std::int64_t columns, std::int64_t groups,
                DType dtype, void* out, cudaStream_t stream);
void pack(const std::uint8_t* codes, std::int64_t rows, std::int64_t columns, int bits, std::int32_t* packed,
          cudaStream_t stream);
void unpack(const std::int32_t* packed, std::int64_t rows, std::int64_t columns, int bits,
            std::uint8_t* codes, cudaStream_t stream);

}  // namespace quantmill::cuda
