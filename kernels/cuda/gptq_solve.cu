#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/convert.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.cuh"

// One block of a solve, at most 128 columns, each at a place of 0 … 127 (SolveSlots). A warp owns 32
// rows and walks the block in strips of 16 places: what the errors of earlier strips push onto a strip
// comes from tensor cores (bf16 in two parts) or, where kExact, from fp32 sums of each thread; inside the
// strip a thread walks its row in fp32. Where scales are searched a row has a team of threads, each of which
// tries some of the candidates: shared memory holds too few rows for walkers alone to hide latency.
namespace quantmill::cuda {
namespace {

using bf16 = __nv_bfloat16;
constexpr int kPlaces = kSolveBlock;
constexpr int kStrip = 16;
constexpr int kStrips = kPlaces / kStrip;
// Threads that search a row's scales. Four hide no more latency and read each weight twice as often: at
// 57344 x 8192 the search then takes 10.6 ms for 6.0.
constexpr int kTeam = 2;

// --- Shared memory. ---

// Rows of 128 floats, 16 bytes apart in banks: a warp reads 16 bytes a lane without conflicts, from
// one row or from 32. A strip of a row, 64 bytes, holds 16 floats or 16 errors as bf16: high, then low.
constexpr int kRowFloats = kPlaces + 4;
// C_ij of strip s of columns and all earlier strips of rows, transposed: [16][16·s], rows padded by eight
// elements; one array of high parts, one of low parts, or one of floats.
__host__ __device__ constexpr int factor_offset(int strip) { return 128 * (strip * strip - 1); }
__host__ __device__ constexpr int factor_stride(int strip) { return kStrip * strip + 8; }
constexpr int kFactorElements = factor_offset(kStrips);
// Products on their way from tensor cores to rows, 16 floats a row, padded.
constexpr int kStageFloats = kStrip + 4;

template <int kRows>
struct Shared {
    float weights[kRows][kRowFloats];
    float pushes[kRows][kRowFloats];  // then errors, strip by strip
    float stage[kRows][kStageFloats];
    float triangle[kStrips][kStrip][kStrip];  // C_ij inside a strip
    float diagonal[kPlaces];                  // R_jj
    union {
        struct {
            bf16 high[kFactorElements], low[kFactorElements];
        } factor;
        float exact_factor[kFactorElements];
    };
};

// --- A warp's strips. ---

__device__ void load_floats(float (&out)[kStrip], const float* source) {
#pragma unroll
    for (int i = 0; i < kStrip; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(source + i);
        out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
}
__device__ void store_floats(float* destination, const float (&values)[kStrip]) {
#pragma unroll
    for (int i = 0; i < kStrip; i += 4) {
        *reinterpret_cast<float4*>(destination + i) =
            make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
}

// 16 floats as high and low bf16 parts in the 64 bytes of a strip.
__device__ void store_parts(float* strip, const float (&values)[kStrip]) {
    std::uint32_t words[kStrip];
#pragma unroll
    for (int i = 0; i < kStrip / 2; ++i) {
        const __nv_bfloat162 high = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        words[i] = *reinterpret_cast<const std::uint32_t*>(&high);
        words[kStrip / 2 + i] =
            pack_bf16(values[2 * i] - __low2float(high), values[2 * i + 1] - __high2float(high));
    }
#pragma unroll
    for (int i = 0; i < kStrip; i += 4) {
        *reinterpret_cast<uint4*>(strip + i) = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
}
__device__ void load_parts(float (&values)[kStrip], const float* strip) {
    float words[kStrip];
    load_floats(words, strip);
#pragma unroll
    for (int i = 0; i < kStrip / 2; ++i) {
        const std::uint32_t high = __float_as_uint(words[i]);
        const std::uint32_t low = __float_as_uint(words[kStrip / 2 + i]);
        values[2 * i] = __uint_as_float(high << 16U) + __uint_as_float(low << 16U);
        values[2 * i + 1] = __uint_as_float(high & 0xFFFF0000U) + __uint_as_float(low & 0xFFFF0000U);
    }
}

// A strip's errors.
template <bool kExact>
__device__ void store_errors(float* strip, const float (&values)[kStrip]) {
    if constexpr (kExact) {
        store_floats(strip, values);
    } else {
        store_parts(strip, values);
    }
}
template <bool kExact>
__device__ void load_errors(float (&values)[kStrip], const float* strip) {
    if constexpr (kExact) {
        load_floats(values, strip);
    } else {
        load_parts(values, strip);
    }
}

// S = w + z of a thread's row over the strips of a group, whose −z stands in the errors.
template <bool kExact>
struct StripElements {
    const float* weights;
    const float* errors;
    const float* diagonal;
    int strips;

    // Four of −z.
    __device__ float4 errors_of(int quad) const {
        const float* strip = errors + quad / 4 * kStrip;
        if constexpr (kExact) return *reinterpret_cast<const float4*>(strip + quad % 4 * 4);
        const uint2 high = *reinterpret_cast<const uint2*>(strip + quad % 4 * 2);
        const uint2 low = *reinterpret_cast<const uint2*>(strip + kStrip / 2 + quad % 4 * 2);
        return make_float4(__uint_as_float(high.x << 16U) + __uint_as_float(low.x << 16U),
                           __uint_as_float(high.x & 0xFFFF0000U) + __uint_as_float(low.x & 0xFFFF0000U),
                           __uint_as_float(high.y << 16U) + __uint_as_float(low.y << 16U),
                           __uint_as_float(high.y & 0xFFFF0000U) + __uint_as_float(low.y & 0xFFFF0000U));
    }
    template <class Function>
    __device__ void each(Function function) const {
#pragma unroll 1
        for (int quad = 0; quad < strips * (kStrip / 4); ++quad) {
            const float4 weight = *reinterpret_cast<const float4*>(weights + quad * 4);
            const float4 factor = *reinterpret_cast<const float4*>(diagonal + quad * 4);
            const float4 error = errors_of(quad);
            function(weight.x - error.x, factor.x * factor.x);
            function(weight.y - error.y, factor.y * factor.y);
            function(weight.z - error.z, factor.z * factor.z);
            function(weight.w - error.w, factor.w * factor.w);
        }
    }
};

// Not inlined: min-max grids, which do without it, shall not pay for its registers. Empty places hold 0,
// which every grid holds.
template <bool kExact, class Team>
__device__ __noinline__ Grid search_strips(StripElements<kExact> elements, Team team, float low, float high,
                                           SolveGrid grid) {
    return search_grid(elements, team, low, high, grid);
}

// The threads of a row, the walker first; `board`: kTeam · 4 floats of shared memory.
template <int kRows>
struct RowTeam {
    static constexpr int kParts = kTeam;
    float4* board;

    __device__ int part() const { return threadIdx.x / kRows; }
    __device__ float sum(float value) const { return value; }
    __device__ Best agree(const Best& best) const {
        board[part()] = make_float4(best.loss, best.parameters.scale, best.parameters.zero,
                                    __int_as_float(best.numerator));
        __syncthreads();
        float4 found = board[0];
#pragma unroll
        for (int p = 1; p < kParts; ++p) {
            if (board[p].x < found.x) found = board[p];
        }
        __syncthreads();
        return {found.x, {found.y, found.z}, __float_as_int(found.w)};
    }
};

template <int kRows, bool kExact>
struct Walker {
    Shared<kRows>& shared;
    int row;  // of the tile, the thread's own
    int lane;

    // Σ errors · C over strips [first, strip) for the thread's row and the 16 places of a strip.
    __device__ void products(float (&out)[kStrip], int first, int strip) const {
        if constexpr (kExact) {
            exact_products(out, first, strip);
        } else {
            tensor_products(out, first, strip);
        }
    }

    __device__ void exact_products(float (&out)[kStrip], int first, int strip) const {
#pragma unroll
        for (int j = 0; j < kStrip; ++j) out[j] = 0.0F;
        const float* factor = shared.exact_factor + factor_offset(strip);
        for (int k = first; k < strip; ++k) {
            float errors[kStrip];
            load_floats(errors, pushes(k));
#pragma unroll
            for (int j = 0; j < kStrip; ++j) {
                float column[kStrip];
                load_floats(column, factor + j * factor_stride(strip) + k * kStrip);
#pragma unroll
                for (int i = 0; i < kStrip; ++i) out[j] += errors[i] * column[i];
            }
        }
    }

    __device__ void tensor_products(float (&out)[kStrip], int first, int strip) const {
        float sum[2][2][4] = {};
        __syncwarp();  // the rows' errors are written, and the stage is read
        const int stride = factor_stride(strip);
        const int factor_row = factor_offset(strip) + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
        for (int k = first; k < strip; ++k) {
            std::uint32_t high[4];
            std::uint32_t low[4];
            load_matrices(high, shared.factor.high + factor_row + k * kStrip);
            load_matrices(low, shared.factor.low + factor_row + k * kStrip);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                // Four floats are eight places.
                const float* errors =
                    &shared.pushes[row - lane + m * 16 + lane % 16][k * kStrip + lane / 16 * 4];
                std::uint32_t a_high[4];
                std::uint32_t a_low[4];
                load_matrices(a_high, errors);
                load_matrices(a_low, errors + kStrip / 2);
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    multiply(sum[m][n], a_high, high[2 * n], high[2 * n + 1]);
                    multiply(sum[m][n], a_high, low[2 * n], low[2 * n + 1]);
                    multiply(sum[m][n], a_low, high[2 * n], high[2 * n + 1]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float* target = &shared.stage[row - lane + m * 16 + lane / 4][n * 8 + lane % 4 * 2];
                *reinterpret_cast<float2*>(target) = make_float2(sum[m][n][0], sum[m][n][1]);
                *reinterpret_cast<float2*>(target + 8 * kStageFloats) =
                    make_float2(sum[m][n][2], sum[m][n][3]);
            }
        }
        __syncwarp();
        load_floats(out, shared.stage[row]);
    }

    __device__ float* weights(int strip) const { return &shared.weights[row][strip * kStrip]; }
    __device__ float* pushes(int strip) const { return &shared.pushes[row][strip * kStrip]; }

    // Continues a strip of a group without quantizing: z = P · (I + triu(C, 1))⁻¹. Errors become −z, the
    // range widens by w + z.
    __device__ void continue_strip(int strip, int width, float& low, float& high) const {
        float push[kStrip];
        float weight[kStrip];
        float pushed[kStrip];
        products(push, 0, strip);
        load_floats(pushed, pushes(strip));
        load_floats(weight, weights(strip));
#pragma unroll
        for (int i = 0; i < kStrip; ++i) push[i] += pushed[i];
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
            if (i < width) {
                low = fminf(low, weight[i] + push[i]);
                high = fmaxf(high, weight[i] + push[i]);
            }
            const float z = i < width ? push[i] : 0.0F;
            const float* factors = shared.triangle[strip][i];
#pragma unroll
            for (int later = i + 1; later < kStrip; ++later) push[later] -= z * factors[later];
            push[i] = -z;
        }
        store_errors<kExact>(pushes(strip), push);
    }

    // The grid of a continued group of `count` strips. Where it is searched a row's whole team calls this;
    // the walker's range counts.
    __device__ Grid choose_grid(int first, int count, float low, float high, const SolveGrid& grid) const {
        if (blockDim.x == kRows) return group_grid(low, high, grid);
        auto* board = reinterpret_cast<float4*>(shared.stage[row]);
        if (threadIdx.x < kRows) board[0] = make_float4(low, high, 0.0F, 0.0F);
        __syncthreads();  // shows the walkers' ranges and errors
        const float4 range = board[0];
        __syncthreads();
        return search_strips<kExact>({weights(first), pushes(first), &shared.diagonal[first * kStrip], count},
                                     RowTeam<kRows>{board}, range.x, range.y, grid);
    }

    // Quantizes a strip; grid_at(i): the grid of its place i. `continued`: the strip holds −z, what earlier
    // groups and blocks push is in w + z, and only strips from `first` on, those of the group, push further,
    // by S − q. Else it holds pushes and all strips push w − q.
    template <class GridAt>
    __device__ void quantize_strip(int strip, int width, int first, bool continued, GridAt grid_at,
                                   float max_code, std::uint8_t (&codes)[kStrip], float& loss) const {
        float push[kStrip];
        float anchor[kStrip];  // w, or S = w + z
        float error[kStrip];   // w − q, kept for later groups
        products(push, first, strip);
        load_floats(anchor, weights(strip));
        {
            float before[kStrip];
            if (continued) {
                load_errors<kExact>(before, pushes(strip));
            } else {
                load_floats(before, pushes(strip));
            }
#pragma unroll
            for (int i = 0; i < kStrip; ++i) {
                error[i] = anchor[i];
                if (continued) {
                    anchor[i] -= before[i];
                } else {
                    push[i] += before[i];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
            const Grid grid = grid_at(i);
            const float target = anchor[i] + push[i];
            const float steps =
                round_half_even(fminf(fmaxf(target * grid.inverse, -grid.zero), max_code - grid.zero));
            const float value = grid.scale * steps;
            const float miss = (target - value) * shared.diagonal[strip * kStrip + i];
            codes[i] = static_cast<std::uint8_t>(steps + grid.zero);
            if (i < width) loss += miss * miss;
            error[i] = i < width ? error[i] - value : 0.0F;
            push[i] = i < width ? anchor[i] - value : 0.0F;
            const float* factors = shared.triangle[strip][i];
#pragma unroll
            for (int later = i + 1; later < kStrip; ++later) push[later] += push[i] * factors[later];
        }
        if (continued) store_floats(weights(strip), error);
        store_errors<kExact>(pushes(strip), push);
    }

    // After a continued group its strips hold S − q; later groups want w − q.
    __device__ void settle_strip(int strip) const {
        float error[kStrip];
        load_floats(error, weights(strip));
        store_errors<kExact>(pushes(strip), error);
    }
};

// --- Between global and shared memory. ---

// The block's places of the warp's rows; 16 bytes at a time where places are columns.
template <int kRows>
__device__ void load_rows(float (&tile)[kRows][kRowFloats], const float* source, std::int64_t ld,
                          const SolveSlots& slots, int width, bool vectors, std::int64_t first_row,
                          std::int64_t rows) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x - lane;
    for (int r = warp; r < warp + 32; ++r) {
        const bool exists = first_row + r < rows;
        const float* row = source + (exists ? (first_row + r) * ld : 0);
        if (vectors) {
            const bool valid = exists && lane * 4 < width;
            copy_async_16(&tile[r][lane * 4], valid ? row + lane * 4 : source, valid);
            continue;
        }
        for (int place = lane; place < kPlaces; place += 32) {
            const int column = slots.column(place);
            const bool valid = exists && column >= 0 && column < width;
            copy_async_4(&tile[r][place], valid ? row + column : source, valid);
        }
    }
}

// C_ij of columns i of earlier strips and j of the block.
template <int kRows>
__device__ void load_factor_parts(Shared<kRows>& shared, const SolveRows& rows, const SolveBlock& block) {
    const auto* parts = static_cast<const bf16*>(block.factor);
    for (int j = kStrip + threadIdx.x / 16; j < kPlaces; j += kRows / 16) {
        const int strip = j / kStrip;
        const int column = rows.slots.column(j);
        const bool valid = column >= 0 && column < block.width;
        const bf16* source = parts + (valid ? column * block.ld_factor : 0);
        const int target = factor_offset(strip) + j % kStrip * factor_stride(strip);
        const int k = threadIdx.x % 16 * 8;
        if (k >= strip * kStrip) continue;
        copy_async_16(shared.factor.high + target + k, source + k, valid);
        copy_async_16(shared.factor.low + target + k, source + kPlaces + k, valid);
    }
}
template <int kRows>
__device__ void load_exact_factor(Shared<kRows>& shared, const SolveRows& rows, const SolveBlock& block) {
    for (int e = threadIdx.x; e < kPlaces * kPlaces; e += kRows) {
        const int i = e / kPlaces;
        const int j = e % kPlaces;
        const int strip = j / kStrip;
        if (i >= strip * kStrip) continue;
        const int row = rows.slots.column(i);
        const int column = rows.slots.column(j);
        const bool valid = row >= 0 && column >= 0 && column < block.width;
        const float* source =
            valid ? rows.factor + (block.first + row) * rows.columns + block.first + column : rows.factor;
        copy_async_4(shared.exact_factor + factor_offset(strip) + j % kStrip * factor_stride(strip) + i,
                     source, valid);
    }
}

// C_ij inside strips, and R_jj.
template <int kRows>
__device__ void load_triangles(Shared<kRows>& shared, const SolveRows& rows, const SolveBlock& block) {
    for (int i = threadIdx.x / kStrip; i < kPlaces; i += kRows / kStrip) {
        const int j = i / kStrip * kStrip + threadIdx.x % kStrip;
        const int row = rows.slots.column(i);
        const int column = rows.slots.column(j);
        const bool valid = row >= 0 && row < block.width && column >= 0 && column < block.width;
        const float* source =
            valid ? rows.factor + (block.first + row) * rows.columns + block.first + column : rows.factor;
        copy_async_4(&shared.triangle[i / kStrip][i % kStrip][j % kStrip], source, valid && i < j);
        if (i == j) copy_async_4(&shared.diagonal[i], source, valid);
    }
}

template <int kRows, bool kExact>
__device__ Walker<kRows, kExact> make_walker(const SolveRows& rows, const SolveBlock& block, bool vectors) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared<kRows>*>(memory);
    const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * kRows;
    if (threadIdx.x < kRows) {
        load_rows(shared.weights, rows.weights + block.first, rows.columns, rows.slots, block.width, vectors,
                  first_row, rows.rows);
        load_rows(shared.pushes, block.pushes, block.ld_pushes, rows.slots, block.width, vectors, first_row,
                  rows.rows);
        if constexpr (kExact) {
            load_exact_factor(shared, rows, block);
        } else {
            load_factor_parts(shared, rows, block);
        }
        load_triangles(shared, rows, block);
        wait_for_copies();
    }
    __syncthreads();
    return {shared, static_cast<int>(threadIdx.x % kRows), static_cast<int>(threadIdx.x % 32)};
}

// The warp's errors into their columns.
template <int kRows>
__device__ void write_exact_errors(const Shared<kRows>& shared, const SolveRows& rows,
                                   const SolveBlock& block) {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x - lane;
    const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * kRows;
    for (int r = warp; r < warp + 32 && first_row + r < rows.rows; ++r) {
        float* errors = static_cast<float*>(rows.errors) + (first_row + r) * rows.ld_errors + block.first;
        for (int place = lane; place < kPlaces; place += 32) {
            const int column = rows.slots.column(place);
            if (column >= 0 && column < block.width) errors[column] = shared.pushes[r][place];
        }
    }
}

// The warp's errors into their slot: 128 times high, high, low part; half a warp a row.
template <int kRows>
__device__ void write_error_parts(const Shared<kRows>& shared, const SolveRows& rows, const SolveBlock& block,
                                  int strips) {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    const int chunk = lane % 16;  // eight places
    const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * kRows;
    for (int r = threadIdx.x - lane + lane / 16; r < threadIdx.x - lane + 32; r += 2) {
        if (first_row + r >= rows.rows) continue;
        const float* strip = &shared.pushes[r][chunk / 2 * kStrip + chunk % 2 * 4];
        uint4 high = *reinterpret_cast<const uint4*>(strip);
        uint4 low = *reinterpret_cast<const uint4*>(strip + kStrip / 2);
        if (chunk / 2 >= strips) high = low = make_uint4(0, 0, 0, 0);
        auto* slot = reinterpret_cast<uint4*>(static_cast<bf16*>(rows.errors) +
                                              (first_row + r) * rows.ld_errors + block.slot * kSolveSlot);
        slot[chunk] = high;
        slot[chunk + 16] = high;
        slot[chunk + 32] = low;
    }
}

__device__ void store_codes(std::uint8_t* destination, const std::uint8_t (&codes)[kStrip], int width) {
    if (width == kStrip && reinterpret_cast<std::uintptr_t>(destination) % 16 == 0) {
        std::uint32_t words[4] = {};
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
            words[i / 4] |= static_cast<std::uint32_t>(codes[i]) << (i % 4 * 8);
        }
        *reinterpret_cast<uint4*>(destination) = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
        if (i < width) destination[i] = codes[i];
    }
}

// --- The kernels. ---

// kGiven: scales and zeros are given, for each column those of any group.
template <int kRows, bool kExact, bool kGiven>
__global__ void __launch_bounds__(kTeam* kRows)
    solve_block_kernel(SolveRows rows, SolveBlock block, bool vectors) {
    const auto walker = make_walker<kRows, kExact>(rows, block, vectors);
    const bool walks = threadIdx.x < kRows;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRows + walker.row;
    const bool mine = walks && row < rows.rows;
    const auto max_code = static_cast<float>((1 << rows.grid.bits) - 1);
    const bool continued = !block.grid_known;
    float loss = 0.0F;
    int strips = 0;
    for (int done = 0; done < block.width; done += rows.slots.piece, strips += rows.slots.padded / kStrip) {
        const int first = strips;
        const int width = min(rows.slots.piece, block.width - done);
        const int count = (width + kStrip - 1) / kStrip;
        const std::int64_t group = (block.first + done) / rows.grid.group_size;
        Grid grid = make_grid(1.0F, 0.0F);
        if (continued) {
            float low = 0.0F;
            float high = 0.0F;
            for (int s = 0; walks && s < count; ++s) {
                walker.continue_strip(first + s, min(kStrip, width - s * kStrip), low, high);
            }
            grid = walker.choose_grid(first, count, low, high, rows.grid);
            if (mine) store_grid(rows, row, group, grid);
        } else if (mine && !kGiven) {
            grid = load_grid(rows, row, group);
        }
        if (!walks) continue;
        for (int s = 0; s < count; ++s) {
            const int strip_width = min(kStrip, width - s * kStrip);
            const auto grid_at = [&](int i) {
                if constexpr (!kGiven) return grid;
                if (!mine || i >= strip_width) return make_grid(1.0F, 0.0F);
                return load_grid(rows, row, rows.given[block.first + done + s * kStrip + i]);
            };
            std::uint8_t codes[kStrip];
            walker.quantize_strip(first + s, strip_width, continued ? first : 0, continued, grid_at, max_code,
                                  codes, loss);
            if (mine) {
                store_codes(rows.codes + row * rows.columns + block.first + done + s * kStrip, codes,
                            strip_width);
            }
        }
        if (continued) {
            __syncwarp();
            for (int s = 0; s < count; ++s) walker.settle_strip(first + s);
        }
    }
    if (!walks) return;
    if (mine) rows.loss[row] = block.first == 0 ? loss : rows.loss[row] + loss;
    if constexpr (kExact) {
        write_exact_errors(walker.shared, rows, block);
    } else {
        write_error_parts(walker.shared, rows, block, strips);
    }
}

// One block of a group that is wider than a block: widens ranges, leaves −z in the errors.
template <int kRows, bool kExact>
__global__ void __launch_bounds__(kRows)
    continue_block_kernel(SolveRows rows, SolveBlock block, bool vectors, float2* ranges) {
    const auto walker = make_walker<kRows, kExact>(rows, block, vectors);
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRows + threadIdx.x;
    float2 range = make_float2(0.0F, 0.0F);
    const bool starts = block.first % rows.grid.group_size == 0;
    if (row < rows.rows && !starts) range = ranges[row];
    const int strips = (block.width + kStrip - 1) / kStrip;
    for (int s = 0; s < strips; ++s) {
        walker.continue_strip(s, min(kStrip, block.width - s * kStrip), range.x, range.y);
    }
    if (row < rows.rows) ranges[row] = range;
    if constexpr (kExact) {
        write_exact_errors(walker.shared, rows, block);
    } else {
        write_error_parts(walker.shared, rows, block, strips);
    }
}

constexpr int kTileColumns = 32;
constexpr int kTransposeThreads = 256;

// One slot of rows i of the factor and 32 of a panel's columns j: out[j, slot] is 128 times C_ij's high
// part, low part, high part; zero where i is not above j or the place is empty.
__global__ void __launch_bounds__(kTransposeThreads)
    factor_slots_kernel(const float* factor, std::int64_t columns, SolveSlots slots, std::int64_t first,
                        std::int64_t last, bf16* out, std::int64_t ld) {
    __shared__ float tile[kPlaces][kTileColumns + 1];
    const std::int64_t slot = blockIdx.x;
    const std::int64_t top = slots.first(slot);
    const std::int64_t bottom = min(slots.first(slot + 1), columns);
    const std::int64_t left = first + static_cast<std::int64_t>(blockIdx.y) * kTileColumns;
    const int lane = threadIdx.x % kTileColumns;
#pragma unroll 4
    for (int r = threadIdx.x / kTileColumns; r < kPlaces; r += kTransposeThreads / kTileColumns) {
        const int offset = slots.column(r);
        const std::int64_t i = top + offset;
        const std::int64_t j = left + lane;
        const bool valid = offset >= 0 && i < bottom && j < last && i < j;
        tile[r][lane] = valid ? factor[i * columns + j] : 0.0F;
    }
    __syncthreads();
    const int i = threadIdx.x % kPlaces;
    for (int c = threadIdx.x / kPlaces; c < kTileColumns && left + c < last;
         c += kTransposeThreads / kPlaces) {
        bf16* target = out + (left + c - first) * ld + slot * kSolveSlot + i;
        const bf16 high = from_float<bf16>(tile[i][c]);
        target[0] = high;
        target[kPlaces] = from_float<bf16>(tile[i][c] - to_float(high));
        target[2 * kPlaces] = high;
    }
}

// Whether places are columns and rows of weights and pushes may be moved 16 bytes at a time.
bool places_are_vectors(const SolveRows& rows, const SolveBlock& block) {
    const auto bits = reinterpret_cast<std::uintptr_t>(rows.weights + block.first) |
                      reinterpret_cast<std::uintptr_t>(block.pushes);
    return rows.slots.piece == rows.slots.padded && block.width % 4 == 0 && rows.columns % 4 == 0 &&
           block.ld_pushes % 4 == 0 && bits % 16 == 0;
}

template <class Kernel, class... Rest>
void launch(Kernel kernel, const char* name, int rows_per_block, int threads, std::size_t shared_bytes,
            const SolveRows& rows, const SolveBlock& block, cudaStream_t stream, Rest... rest) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute for a solve", {{"shared bytes", static_cast<long long>(shared_bytes)}});
    const dim3 grid(static_cast<unsigned>(divide_up(rows.rows, rows_per_block)));
    kernel<<<grid, threads, shared_bytes, stream>>>(rows, block, places_are_vectors(rows, block), rest...);
    check_launch(name, grid, threads);
}

bool shared_memory_holds(std::size_t bytes) {
    int device = 0;
    int most = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute", {{"device", device}});
    return static_cast<std::size_t>(most) >= bytes;
}

}  // namespace

void factor_slots(const float* factor, std::int64_t columns, const SolveSlots& slots, std::int64_t count,
                  std::int64_t first, std::int64_t last, void* out, std::int64_t ld, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(count),
                    static_cast<unsigned>(divide_up(last - first, kTileColumns)));
    factor_slots_kernel<<<grid, kTransposeThreads, 0, stream>>>(factor, columns, slots, first, last,
                                                                static_cast<bf16*>(out), ld);
    check_launch("factor_slots_kernel", grid, kTransposeThreads);
}

namespace {

template <int kRows, bool kGiven>
void launch_block(const SolveRows& rows, const SolveBlock& block, cudaStream_t stream) {
    const auto kernel =
        rows.exact ? solve_block_kernel<kRows, true, kGiven> : solve_block_kernel<kRows, false, kGiven>;
    const bool searches = !block.grid_known && rows.grid.search != ScaleSearch::minmax;
    const int threads = searches ? kTeam * kRows : kRows;
    launch(kernel, "solve_block_kernel", kRows, threads, sizeof(Shared<kRows>), rows, block, stream);
}

}  // namespace

void solve_block(const SolveRows& rows, const SolveBlock& block, cudaStream_t stream) {
    const bool given = rows.given != nullptr;
    if (shared_memory_holds(sizeof(Shared<64>))) {
        given ? launch_block<64, true>(rows, block, stream) : launch_block<64, false>(rows, block, stream);
    } else {
        given ? launch_block<32, true>(rows, block, stream) : launch_block<32, false>(rows, block, stream);
    }
}

void continue_block(const SolveRows& rows, const SolveBlock& block, void* ranges, cudaStream_t stream) {
    const auto kernel = rows.exact ? continue_block_kernel<32, true> : continue_block_kernel<32, false>;
    launch(kernel, "continue_block_kernel", 32, 32, sizeof(Shared<32>), rows, block, stream,
           static_cast<float2*>(ranges));
}

}  // namespace quantmill::cuda
