#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/cuda/convert.cuh"
#include "kernels/cuda/launch.h"

// All of these are bound by memory: sixteen bytes an access, one pass, a grid that strides over the
// elements so that no count is too large for it.
namespace quantmill::cuda {
namespace {

using bf16 = __nv_bfloat16;
constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 1 << 16;

dim3 grid_for(std::int64_t threads) {
    return {static_cast<unsigned>(std::clamp<std::int64_t>(divide_up(threads, kThreads), 1, kMostBlocks))};
}

__device__ std::int64_t first_index() {
    return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ std::int64_t index_stride() { return static_cast<std::int64_t>(gridDim.x) * blockDim.x; }

// operation(i) for elements, or for runs of eight where `vectors` of them come first.
template <class Vector, class Scalar>
__device__ void for_each(std::int64_t count, bool aligned, Vector vector, Scalar scalar) {
    const std::int64_t vectors = aligned ? count / 8 : 0;
    for (std::int64_t i = first_index(); i < vectors; i += index_stride()) vector(i);
    for (std::int64_t i = vectors * 8 + first_index(); i < count; i += index_stride()) scalar(i);
}

bool aligned(std::initializer_list<const void*> pointers) {
    return std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
        return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
    });
}

template <class From, class To>
__global__ void convert_kernel(const From* source, To* destination, std::int64_t count, bool vectors) {
    for_each(
        count, vectors,
        [&](std::int64_t i) {
            const auto in = reinterpret_cast<const Eight<From>*>(source)[i];
            Eight<To> out;
#pragma unroll
            for (int e = 0; e < 8; ++e) out.value[e] = from_float<To>(to_float(in.value[e]));
            reinterpret_cast<Eight<To>*>(destination)[i] = out;
        },
        [&](std::int64_t i) { destination[i] = from_float<To>(to_float(source[i])); });
}

template <class T>
__global__ void embed_kernel(const std::int32_t* ids, const T* table, std::int64_t columns, bf16* out) {
    const std::int64_t token = blockIdx.x;
    const T* row = table + ids[token] * columns;
    for (std::int64_t c = threadIdx.x; c < columns; c += blockDim.x) {
        out[token * columns + c] = from_float<bf16>(to_float(row[c]));
    }
}

// Sum over kGroup consecutive threads, the same in all of them and the same in every run.
template <int kGroup>
__device__ float group_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xFFFFFFFFU, value, offset);
    }
    if constexpr (kGroup > 32) {
        __shared__ float partial[kGroup / 32];
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
        __syncthreads();
        value = 0.0F;
        for (const float part : partial) value += part;
    }
    return value;
}

// kGroup threads a row; vectors says that rows are whole runs of eight, 16-byte aligned.
template <int kGroup>
__global__ void rms_norm_kernel(const bf16* x, const float* weight, float eps, std::int64_t rows, int columns,
                                bool vectors, bf16* out) {
    const std::int64_t row = blockIdx.x * static_cast<std::int64_t>(kThreads / kGroup) + threadIdx.x / kGroup;
    if (row >= rows) return;  // whole warps: a group is a warp or the block
    const int lane = threadIdx.x % kGroup;
    const bf16* in = x + row * columns;
    bf16* result = out + row * columns;
    const int runs = vectors ? columns / 8 : 0;

    float sum = 0.0F;
    for (int i = lane; i < runs; i += kGroup) {
        const auto eight = reinterpret_cast<const Eight<bf16>*>(in)[i];
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += to_float(eight.value[e]) * to_float(eight.value[e]);
    }
    for (int c = runs * 8 + lane; c < columns; c += kGroup) sum += to_float(in[c]) * to_float(in[c]);
    const float factor = 1.0F / sqrtf(group_sum<kGroup>(sum) / static_cast<float>(columns) + eps);

    for (int i = lane; i < runs; i += kGroup) {
        auto eight = reinterpret_cast<const Eight<bf16>*>(in)[i];
        const auto scale = reinterpret_cast<const Eight<float>*>(weight)[i];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            eight.value[e] = from_float<bf16>(to_float(eight.value[e]) * factor * scale.value[e]);
        }
        reinterpret_cast<Eight<bf16>*>(result)[i] = eight;
    }
    for (int c = runs * 8 + lane; c < columns; c += kGroup) {
        result[c] = from_float<bf16>(to_float(in[c]) * factor * weight[c]);
    }
}

template <class T>
__global__ void add_bias_kernel(const float* bias, std::int64_t columns, std::int64_t count, T* out) {
    for (std::int64_t i = first_index(); i < count; i += index_stride()) {
        out[i] = from_float<T>(to_float(out[i]) + bias[i % columns]);
    }
}

__global__ void add_kernel(const bf16* x, bf16* accumulated, std::int64_t count, bool vectors) {
    const auto sum = [](bf16 a, bf16 b) { return from_float<bf16>(to_float(a) + to_float(b)); };
    for_each(
        count, vectors,
        [&](std::int64_t i) {
            const auto in = reinterpret_cast<const Eight<bf16>*>(x)[i];
            auto out = reinterpret_cast<Eight<bf16>*>(accumulated)[i];
#pragma unroll
            for (int e = 0; e < 8; ++e) out.value[e] = sum(out.value[e], in.value[e]);
            reinterpret_cast<Eight<bf16>*>(accumulated)[i] = out;
        },
        [&](std::int64_t i) { accumulated[i] = sum(accumulated[i], x[i]); });
}

__global__ void silu_mul_kernel(const bf16* gate, const bf16* up, bf16* out, std::int64_t count,
                                bool vectors) {
    const auto combine = [](bf16 g, bf16 u) {
        const float x = to_float(g);
        return from_float<bf16>(x / (1.0F + __expf(-x)) * to_float(u));
    };
    for_each(
        count, vectors,
        [&](std::int64_t i) {
            const auto g = reinterpret_cast<const Eight<bf16>*>(gate)[i];
            const auto u = reinterpret_cast<const Eight<bf16>*>(up)[i];
            Eight<bf16> result;
#pragma unroll
            for (int e = 0; e < 8; ++e) result.value[e] = combine(g.value[e], u.value[e]);
            reinterpret_cast<Eight<bf16>*>(out)[i] = result;
        },
        [&](std::int64_t i) { out[i] = combine(gate[i], up[i]); });
}

// The last sequence that begins at or before the token; empty sequences own no token.
__device__ std::int32_t sequence_begin(const std::int32_t* offsets, int sequences, std::int64_t token) {
    int low = 0;
    int high = sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (offsets[middle] <= token ? low : high) = middle;
    }
    return offsets[low];
}

// One thread block a token; kRun neighbouring pairs (x[i], x[i + D/2]) a step.
template <int kRun>
__global__ void rope_kernel(bf16* x, const std::int32_t* offsets, int sequences, int heads, int half,
                            const float* cosines, const float* sines) {
    struct alignas(kRun * sizeof(bf16)) Run {
        bf16 value[kRun];
    };
    const std::int64_t token = blockIdx.x;
    const std::int64_t position = token - sequence_begin(offsets, sequences, token);
    const float* cosine = cosines + position * half;
    const float* sine = sines + position * half;
    bf16* row = x + token * heads * half * 2;
    const int runs = half / kRun;
    for (int i = threadIdx.x; i < heads * runs; i += blockDim.x) {
        const int offset = i % runs * kRun;
        auto* first = reinterpret_cast<Run*>(row + i / runs * half * 2 + offset);
        auto* second = reinterpret_cast<Run*>(row + i / runs * half * 2 + half + offset);
        Run a = *first;
        Run b = *second;
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
            const float c = cosine[offset + e];
            const float s = sine[offset + e];
            const float left = to_float(a.value[e]);
            const float right = to_float(b.value[e]);
            a.value[e] = from_float<bf16>(left * c - right * s);
            b.value[e] = from_float<bf16>(right * c + left * s);
        }
        *first = a;
        *second = b;
    }
}

template <class T, class Combine>
__device__ T block_reduce(T value, Combine combine) {
    __shared__ T values[kThreads];
    values[threadIdx.x] = value;
    for (int width = kThreads / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) {
            values[threadIdx.x] = combine(values[threadIdx.x], values[threadIdx.x + width]);
        }
    }
    __syncthreads();
    const T result = values[0];
    __syncthreads();
    return result;
}

__global__ void cross_entropy_kernel(const float* logits, const std::int32_t* targets, std::int64_t columns,
                                     double* out) {
    const float* row = logits + blockIdx.x * columns;
    float maximum = -INFINITY;
    for (std::int64_t c = threadIdx.x; c < columns; c += kThreads) maximum = fmaxf(maximum, row[c]);
    maximum = block_reduce(maximum, [](float a, float b) { return fmaxf(a, b); });
    double sum = 0.0;
    for (std::int64_t c = threadIdx.x; c < columns; c += kThreads) {
        sum += exp(static_cast<double>(row[c]) - maximum);
    }
    sum = block_reduce(sum, [](double a, double b) { return a + b; });
    if (threadIdx.x == 0) out[blockIdx.x] = log(sum) + maximum - row[targets[blockIdx.x]];
}

// log Σ exp of a row and where it is highest; of equals, the first.
struct RowSummary {
    double log_sum;
    std::int64_t top;
};

__device__ RowSummary summarise(const float* row, std::int64_t columns) {
    float maximum = -INFINITY;
    for (std::int64_t c = threadIdx.x; c < columns; c += kThreads) maximum = fmaxf(maximum, row[c]);
    maximum = block_reduce(maximum, [](float a, float b) { return fmaxf(a, b); });
    std::int64_t top = columns;
    double sum = 0.0;
    for (std::int64_t c = threadIdx.x; c < columns; c += kThreads) {
        sum += exp(static_cast<double>(row[c]) - maximum);
        if (row[c] == maximum && c < top) top = c;
    }
    sum = block_reduce(sum, [](double a, double b) { return a + b; });
    top = block_reduce(top, [](std::int64_t a, std::int64_t b) { return a < b ? a : b; });
    return {log(sum) + maximum, top};
}

__global__ void logit_distances_kernel(const float* reference, const float* logits, std::int64_t columns,
                                       double* divergence, double* same_top) {
    const float* expected = reference + blockIdx.x * columns;
    const float* row = logits + blockIdx.x * columns;
    const RowSummary of_expected = summarise(expected, columns);
    const RowSummary of_row = summarise(row, columns);
    double sum = 0.0;
    for (std::int64_t c = threadIdx.x; c < columns; c += kThreads) {
        const double log_expected = static_cast<double>(expected[c]) - of_expected.log_sum;
        sum += exp(log_expected) * (log_expected - (static_cast<double>(row[c]) - of_row.log_sum));
    }
    sum = block_reduce(sum, [](double a, double b) { return a + b; });
    if (threadIdx.x == 0) {
        divergence[blockIdx.x] = sum;
        same_top[blockIdx.x] = of_expected.top == of_row.top ? 1.0 : 0.0;
    }
}

template <class T>
__global__ void permute_columns_kernel(const T* x, const std::int32_t* order, std::int64_t columns, T* out) {
    const std::int64_t row = blockIdx.x * columns;
    for (std::int64_t c = threadIdx.x; c < columns; c += blockDim.x) out[row + c] = x[row + order[c]];
}

__global__ void zero_columns_kernel(const std::int32_t* which, std::int64_t count, std::int64_t columns,
                                    float* x) {
    for (std::int64_t i = threadIdx.x; i < count; i += kThreads) x[blockIdx.x * columns + which[i]] = 0.0F;
}

__global__ void squared_distance_kernel(const float* a, const float* b, std::int64_t columns, double* out) {
    double sum = 0.0;
    for (std::int64_t c = threadIdx.x; c < columns; c += kThreads) {
        const double difference = static_cast<double>(a[blockIdx.x * columns + c]) -
                                  static_cast<double>(b[blockIdx.x * columns + c]);
        sum += difference * difference;
    }
    sum = block_reduce(sum, [](double x, double y) { return x + y; });
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

}  // namespace

void convert(const void* source, DType from, void* destination, DType to, std::int64_t count,
             cudaStream_t stream) {
    if (count == 0) return;
    const dim3 grid = grid_for(divide_up(count, 8));
    with_float_type(from, [&](auto in) {
        with_float_type(to, [&](auto out) {
            convert_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const decltype(in)*>(source),
                                                          static_cast<decltype(out)*>(destination), count,
                                                          aligned({source, destination}));
        });
    });
    check_launch("convert_kernel", grid, kThreads);
}

void embed(const std::int32_t* ids, const void* table, DType dtype, std::int64_t tokens, std::int64_t columns,
           void* out, cudaStream_t stream) {
    if (tokens == 0) return;
    const dim3 grid(static_cast<unsigned>(tokens));
    with_float_type(dtype, [&](auto type) {
        embed_kernel<<<grid, kThreads, 0, stream>>>(ids, static_cast<const decltype(type)*>(table), columns,
                                                    static_cast<bf16*>(out));
    });
    check_launch("embed_kernel", grid, kThreads);
}

void rms_norm(const void* x, const float* weight, float eps, std::int64_t rows, std::int64_t columns,
              void* out, cudaStream_t stream) {
    if (rows == 0) return;
    constexpr std::int64_t kWidestOfAWarp = 1024;
    const bool warp = columns <= kWidestOfAWarp;
    const bool vectors = columns % 8 == 0 && aligned({x, weight, out});
    const dim3 grid(static_cast<unsigned>(warp ? divide_up(rows, kThreads / 32) : rows));
    const auto kernel = warp ? rms_norm_kernel<32> : rms_norm_kernel<kThreads>;
    kernel<<<grid, kThreads, 0, stream>>>(static_cast<const bf16*>(x), weight, eps, rows,
                                          static_cast<int>(columns), vectors, static_cast<bf16*>(out));
    check_launch("rms_norm_kernel", grid, kThreads);
}

void add_bias(const float* bias, std::int64_t rows, std::int64_t columns, DType dtype, void* out,
              cudaStream_t stream) {
    const std::int64_t count = rows * columns;
    if (count == 0) return;
    const dim3 grid = grid_for(count);
    with_float_type(dtype, [&](auto type) {
        add_bias_kernel<<<grid, kThreads, 0, stream>>>(bias, columns, count,
                                                       static_cast<decltype(type)*>(out));
    });
    check_launch("add_bias_kernel", grid, kThreads);
}

void add(const void* x, void* accumulated, std::int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    const dim3 grid = grid_for(divide_up(count, 8));
    add_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const bf16*>(x), static_cast<bf16*>(accumulated),
                                              count, aligned({x, accumulated}));
    check_launch("add_kernel", grid, kThreads);
}

void rope(void* x, const std::int32_t* offsets, int sequences, std::int64_t tokens, int heads, int head_dim,
          const float* cos_sin, std::int64_t positions, cudaStream_t stream) {
    if (tokens == 0) return;
    const int half = head_dim / 2;
    const dim3 grid(static_cast<unsigned>(tokens));
    const auto kernel = half % 8 == 0 && aligned({x}) ? rope_kernel<8> : rope_kernel<1>;
    kernel<<<grid, kThreads, 0, stream>>>(static_cast<bf16*>(x), offsets, sequences, heads, half, cos_sin,
                                          cos_sin + positions * half);
    check_launch("rope_kernel", grid, kThreads);
}

void silu_mul(const void* gate, const void* up, void* out, std::int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    const dim3 grid = grid_for(divide_up(count, 8));
    silu_mul_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const bf16*>(gate),
                                                   static_cast<const bf16*>(up), static_cast<bf16*>(out),
                                                   count, aligned({gate, up, out}));
    check_launch("silu_mul_kernel", grid, kThreads);
}

void cross_entropy(const float* logits, const std::int32_t* targets, std::int64_t rows, std::int64_t columns,
                   double* out, cudaStream_t stream) {
    if (rows == 0) return;
    const dim3 grid(static_cast<unsigned>(rows));
    cross_entropy_kernel<<<grid, kThreads, 0, stream>>>(logits, targets, columns, out);
    check_launch("cross_entropy_kernel", grid, kThreads);
}

void logit_distances(const float* reference, const float* logits, std::int64_t rows, std::int64_t columns,
                     double* divergence, double* same_top, cudaStream_t stream) {
    if (rows == 0) return;
    const dim3 grid(static_cast<unsigned>(rows));
    logit_distances_kernel<<<grid, kThreads, 0, stream>>>(reference, logits, columns, divergence, same_top);
    check_launch("logit_distances_kernel", grid, kThreads);
}

void permute_columns(const void* x, DType dtype, const std::int32_t* order, std::int64_t rows,
                     std::int64_t columns, void* out, cudaStream_t stream) {
    if (rows == 0) return;
    const dim3 grid(static_cast<unsigned>(rows));
    if (dtype == DType::f32) {
        permute_columns_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const float*>(x), order, columns,
                                                              static_cast<float*>(out));
    } else if (dtype == DType::f16) {
        permute_columns_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const __half*>(x), order, columns,
                                                              static_cast<__half*>(out));
    } else {
        permute_columns_kernel<<<grid, kThreads, 0, stream>>>(static_cast<const std::uint8_t*>(x), order,
                                                              columns, static_cast<std::uint8_t*>(out));
    }
    check_launch("permute_columns_kernel", grid, kThreads);
}

void zero_columns(const std::int32_t* which, std::int64_t count, std::int64_t rows, std::int64_t columns,
                  float* x, cudaStream_t stream) {
    if (rows == 0 || count == 0) return;
    const dim3 grid(static_cast<unsigned>(rows));
    zero_columns_kernel<<<grid, kThreads, 0, stream>>>(which, count, columns, x);
    check_launch("zero_columns_kernel", grid, kThreads);
}

void squared_distance(const float* a, const float* b, std::int64_t rows, std::int64_t columns, double* out,
                      cudaStream_t stream) {
    if (rows == 0) return;
    const dim3 grid(static_cast<unsigned>(rows));
    squared_distance_kernel<<<grid, kThreads, 0, stream>>>(a, b, columns, out);
    check_launch("squared_distance_kernel", grid, kThreads);
}

}  // namespace quantmill::cuda
