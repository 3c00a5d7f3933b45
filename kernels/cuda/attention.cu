#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.cuh"

// Causal grouped-query attention with an online softmax (FlashAttention-2, arXiv 2307.08691): a
// thread block owns kQueries queries of one head and walks the keys they see, so nothing of size
// T x T is ever stored. Products run on tensor cores as mma.m16n8k16.
namespace quantmill::cuda {
namespace {

using bf16 = __nv_bfloat16;

// Tile sizes for head dimensions up to D. A warp owns 16 · kSubtiles queries; shared memory stays
// below the 99 KiB that every target has.
template <int D>
struct Tiles {
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kSubtiles = D > 128 ? 1 : 2;
    static constexpr int kQueries = kWarps * 16 * kSubtiles;
    static constexpr int kKeys = D > 128 ? 32 : 64;
    // Rows of eight 16-byte chunks are swizzled, others padded, so that ldmatrix meets no conflict.
    static constexpr bool kSwizzle = D % 64 == 0;
    static constexpr int kStride = kSwizzle ? D : D + 8;
    static constexpr int kQueryElements = kQueries * kStride;
    static constexpr int kKeyElements = kKeys * kStride;
    static constexpr int kBytes = 2 * (kQueryElements + 4 * kKeyElements);

    static __device__ int at(int row, int chunk) {
        return row * kStride + 8 * (kSwizzle ? chunk ^ (row & 7) : chunk);
    }
};

struct Problem {
    const bf16* q;
    const bf16* k;
    const bf16* v;
    bf16* out;
    const std::int32_t* offsets;
    int heads, kv_heads, head_dim;
    float scale_log2;
    int window;
};

__device__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Copies `rows` rows of one head; rows from `limit` on and columns from head_dim on become zero.
template <int D, int kRows>
__device__ void load_tile(bf16* tile, const bf16* head, int first, int limit, std::int64_t stride,
                          int head_dim) {
    using T = Tiles<D>;
    constexpr int kChunks = D / 8;
    for (int i = threadIdx.x; i < kRows * kChunks; i += T::kThreads) {
        const int row = i / kChunks;
        const int chunk = i % kChunks;
        const bool valid = first + row < limit && chunk * 8 < head_dim;
        const std::int64_t source = valid ? (first + row) * stride + chunk * 8 : 0;
        copy_async_16(tile + T::at(row, chunk), head + source, valid);
    }
}

// What a warp keeps of one subtile of 16 queries; a lane holds the rows lane/4 and lane/4 + 8.
template <int D>
struct State {
    float out[D / 8][4];
    float maximum[2];
    float sum[2];
};

// scores of one subtile: queries (16 rows from `row`) times all keys of the tile.
template <int D>
__device__ void score(float (&s)[Tiles<D>::kSubtiles][Tiles<D>::kKeys / 8][4], const bf16* queries,
                      const bf16* keys, int row, int lane) {
    using T = Tiles<D>;
#pragma unroll
    for (auto& subtile : s)
#pragma unroll
        for (auto& fragment : subtile)
#pragma unroll
            for (float& value : fragment) value = 0.0F;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        std::uint32_t a[T::kSubtiles][4];
#pragma unroll
        for (int m = 0; m < T::kSubtiles; ++m) {
            load_matrices(a[m], queries + T::at(row + m * 16 + lane % 16, step * 2 + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < T::kKeys / 16; ++n) {
            std::uint32_t b[4];
            load_matrices(b, keys + T::at(n * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < T::kSubtiles; ++m) {
                multiply(s[m][2 * n], a[m], b[0], b[1]);
                multiply(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

template <int kFragments>
__device__ void mask(float (&s)[kFragments][4], int query, int key, int window) {
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = query + e / 2 * 8;
            const int column = key + n * 8 + e % 2;
            if (column > row || column <= row - window) s[n][e] = -INFINITY;
        }
    }
}

// Turns scores into probabilities relative to the new running maximum and rescales what was summed.
template <int D, int kFragments>
__device__ void update(State<D>& state, float (&s)[kFragments][4], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float maximum = state.maximum[half];
#pragma unroll
        for (int n = 0; n < kFragments; ++n) {
            maximum = fmaxf(maximum, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(0xFFFFFFFFU, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xFFFFFFFFU, maximum, 2));
        // A row that has seen no key yet keeps zeros instead of inf - inf.
        const float shift = maximum == -INFINITY ? 0.0F : maximum * scale_log2;
        const float rescale = exp2_fast(state.maximum[half] * scale_log2 - shift);
        state.maximum[half] = maximum;
        state.sum[half] *= rescale;
#pragma unroll
        for (auto& fragment : state.out) {
            fragment[2 * half] *= rescale;
            fragment[2 * half + 1] *= rescale;
        }
#pragma unroll
        for (int n = 0; n < kFragments; ++n) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
                s[n][e] = exp2_fast(fmaf(s[n][e], scale_log2, -shift));
                state.sum[half] += s[n][e];
            }
        }
    }
}

template <int D>
__device__ void accumulate(State<D> (&state)[Tiles<D>::kSubtiles],
                           const float (&p)[Tiles<D>::kSubtiles][Tiles<D>::kKeys / 8][4], const bf16* values,
                           int lane) {
    using T = Tiles<D>;
#pragma unroll
    for (int step = 0; step < T::kKeys / 16; ++step) {
        std::uint32_t a[T::kSubtiles][4];
#pragma unroll
        for (int m = 0; m < T::kSubtiles; ++m) {
            const auto& left = p[m][2 * step];
            const auto& right = p[m][2 * step + 1];
            a[m][0] = pack_bf16(left[0], left[1]);
            a[m][1] = pack_bf16(left[2], left[3]);
            a[m][2] = pack_bf16(right[0], right[1]);
            a[m][3] = pack_bf16(right[2], right[3]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            std::uint32_t b[4];
            load_matrices_transposed(
                b, values + T::at(step * 16 + lane / 8 % 2 * 8 + lane % 8, n * 2 + lane / 16));
#pragma unroll
            for (int m = 0; m < T::kSubtiles; ++m) {
                multiply(state[m].out[2 * n], a[m], b[0], b[1]);
                multiply(state[m].out[2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

template <int D>
__device__ void store(const State<D>& state, bf16* head, int query, int limit, std::int64_t stride,
                      int head_dim, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = state.sum[half];
        sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFFU, sum, 2);
        const int row = query + half * 8;
        if (row >= limit) continue;
        const float inverse = 1.0F / sum;
        bf16* out = head + row * stride;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const int column = n * 8 + lane % 4 * 2;
            if (column >= head_dim) continue;
            *reinterpret_cast<std::uint32_t*>(out + column) =
                pack_bf16(state.out[n][2 * half] * inverse, state.out[n][2 * half + 1] * inverse);
        }
    }
}

// Grid: heads x tiles of queries x sequences. Tiles with the most keys start first.
template <int D>
__global__ void __launch_bounds__(Tiles<D>::kThreads) attention_kernel(Problem p) {
    using T = Tiles<D>;
    extern __shared__ __align__(16) unsigned char memory[];
    bf16* queries = reinterpret_cast<bf16*>(memory);
    bf16* keys = queries + T::kQueryElements;   // two stages
    bf16* values = keys + 2 * T::kKeyElements;  // two stages

    const int begin = p.offsets[blockIdx.z];
    const int length = p.offsets[blockIdx.z + 1] - begin;
    const int first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * T::kQueries;
    if (first >= length) return;
    const int head = blockIdx.x;
    const int kv_head = head / (p.heads / p.kv_heads);
    const std::int64_t q_stride = static_cast<std::int64_t>(p.heads) * p.head_dim;
    const std::int64_t kv_stride = static_cast<std::int64_t>(p.kv_heads) * p.head_dim;
    const std::int64_t q_base = begin * q_stride + static_cast<std::int64_t>(head) * p.head_dim;
    const std::int64_t kv_base = begin * kv_stride + static_cast<std::int64_t>(kv_head) * p.head_dim;

    const int lane = threadIdx.x % 32;
    const int warp_row = threadIdx.x / 32 * 16 * T::kSubtiles;
    const int warp_first = first + warp_row;
    const int warp_last = warp_first + 16 * T::kSubtiles - 1;
    const int end = min(length, first + T::kQueries);
    const int start = max(0, first - p.window + 1) / T::kKeys * T::kKeys;

    State<D> state[T::kSubtiles] = {};
    for (auto& s : state) s.maximum[0] = s.maximum[1] = -INFINITY;

    const auto load_keys = [&](int key, int stage) {
        load_tile<D, T::kKeys>(keys + stage * T::kKeyElements, p.k + kv_base, key, length, kv_stride,
                               p.head_dim);
        load_tile<D, T::kKeys>(values + stage * T::kKeyElements, p.v + kv_base, key, length, kv_stride,
                               p.head_dim);
    };
    load_tile<D, T::kQueries>(queries, p.q + q_base, first, length, q_stride, p.head_dim);
    load_keys(start, 0);

    int stage = 0;
    for (int key = start; key < end; key += T::kKeys, stage ^= 1) {
        wait_for_copies();
        __syncthreads();  // this stage has arrived, and all warps are done with the other
        if (key + T::kKeys < end) load_keys(key + T::kKeys, stage ^ 1);
        if (key > warp_last) continue;

        float s[T::kSubtiles][T::kKeys / 8][4];
        score<D>(s, queries, keys + stage * T::kKeyElements, warp_row, lane);
        const bool all_visible = key + T::kKeys - 1 <= warp_first && key > warp_last - p.window;
#pragma unroll
        for (int m = 0; m < T::kSubtiles; ++m) {
            if (!all_visible) {
                mask(s[m], warp_first + m * 16 + lane / 4, key + lane % 4 * 2, p.window);
            }
            update<D>(state[m], s[m], p.scale_log2);
        }
        accumulate<D>(state, s, values + stage * T::kKeyElements, lane);
    }
#pragma unroll
    for (int m = 0; m < T::kSubtiles; ++m) {
        store<D>(state[m], p.out + q_base, warp_first + m * 16 + lane / 4, length, q_stride, p.head_dim,
                 lane);
    }
}

template <int D>
void launch(const Problem& problem, int sequences, int longest, cudaStream_t stream) {
    using T = Tiles<D>;
    check(cudaFuncSetAttribute(attention_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kBytes),
          "cudaFuncSetAttribute(attention_kernel)", {{"shared bytes", T::kBytes}});
    const dim3 grid(problem.heads, (longest + T::kQueries - 1) / T::kQueries, sequences);
    attention_kernel<D><<<grid, T::kThreads, T::kBytes, stream>>>(problem);
    check_launch("attention_kernel", grid, T::kThreads);
}

}  // namespace

void attention(const AttentionShape& shape, const void* q, const void* k, const void* v,
               const std::int32_t* offsets, void* out, cudaStream_t stream) {
    constexpr float kLog2E = 1.4426950408889634F;
    const Problem problem{static_cast<const bf16*>(q),
                          static_cast<const bf16*>(k),
                          static_cast<const bf16*>(v),
                          static_cast<bf16*>(out),
                          offsets,
                          shape.heads,
                          shape.kv_heads,
                          shape.head_dim,
                          shape.scale * kLog2E,
                          shape.window};
    const int d = shape.head_dim;
    const auto run = d <= 32    ? launch<32>
                     : d <= 64  ? launch<64>
                     : d <= 80  ? launch<80>
                     : d <= 96  ? launch<96>
                     : d <= 128 ? launch<128>
                                : launch<256>;
    run(problem, shape.sequences, shape.longest, stream);
}

}  // namespace quantmill::cuda
