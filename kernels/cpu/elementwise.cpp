#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/half.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

constexpr std::int64_t kChunk = 4096;  // elements that a thread takes at a time
constexpr std::int64_t kLanes = 16;    // partial sums of a reduction, in a fixed order on any processor

float load(float value) { return value; }
float load(Half value) { return to_float(value); }
float load(BFloat16 value) { return to_float(value); }

template <class T>
T store(float value) {
    if constexpr (std::is_same_v<T, Half>) return to_half(value);
    if constexpr (std::is_same_v<T, BFloat16>) return to_bfloat16(value);
    if constexpr (std::is_same_v<T, float>) return value;
}

// Calls function(element) with a zero of the floating-point type that dtype names.
template <class Function>
void with_float_type(DType dtype, std::string_view operation, Function function) {
    switch (dtype) {
        case DType::f32: return function(float{});
        case DType::f16: return function(Half{});
        case DType::bf16: return function(BFloat16{});
        default: throw InternalError("{}: {} is no f32, f16 or bf16", operation, name_of(dtype));
    }
}

template <class From, class To>
void convert_range(const From* source, To* destination, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) destination[i] = store<To>(load(source[i]));
}

// The conversions of every checkpoint load; the others are rare.
QUANTMILL_HOT_LOOP void convert_hot(const BFloat16* source, float* destination, std::int64_t count) {
    convert_range(source, destination, count);
}
QUANTMILL_HOT_LOOP void convert_hot(const Half* source, float* destination, std::int64_t count) {
    convert_range(source, destination, count);
}
template <class From, class To>
void convert_hot(const From* source, To* destination, std::int64_t count) {
    convert_range(source, destination, count);
}

// Σ term(i) over [0, count) in double precision. Inlined so that it takes its caller's instruction set.
template <class Term>
[[gnu::always_inline]] inline double lane_sum(std::int64_t count, Term term) {
    double sums[kLanes] = {};
    const std::int64_t whole = count / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += term(i + lane);
    }
    for (std::int64_t i = whole; i < count; ++i) sums[i - whole] += term(i);
    double sum = 0.0;
    for (const double lane : sums) sum += lane;
    return sum;
}

QUANTMILL_HOT_LOOP void normalise_row(const float* x, const float* weight, float eps, std::int64_t columns,
                                      float* out) {
    const double squares = lane_sum(columns, [x](std::int64_t i) { return double{x[i]} * double{x[i]}; });
    const double mean = squares / static_cast<double>(columns);
    const auto factor = static_cast<float>(1.0 / std::sqrt(mean + double{eps}));
    for (std::int64_t i = 0; i < columns; ++i) out[i] = x[i] * factor * weight[i];
}

QUANTMILL_HOT_LOOP void rotate_head(const float* cosines, const float* sines, std::int64_t half,
                                    float* head) {
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = head[i];
        const float b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

QUANTMILL_HOT_LOOP void silu_mul_range(const float* gate, const float* up, std::int64_t count, float* out) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float x = std::max(gate[i], -88.0F);  // silu is below 1e-36 from there on
        out[i] = x / (1.0F + vector_exp(-x)) * up[i];
    }
}

// log Σ exp(logits), in double precision.
QUANTMILL_HOT_LOOP double log_sum_exp(const float* logits, std::int64_t count) {
    float highest = logits[0];
    for (std::int64_t i = 1; i < count; ++i) highest = std::max(highest, logits[i]);
    const double sum =
        lane_sum(count, [=](std::int64_t i) { return vector_exp(double{logits[i]} - double{highest}); });
    return double{highest} + std::log(sum);
}

// Σ p_ref (log p_ref − log p), given log Σ exp of both rows.
QUANTMILL_HOT_LOOP double row_divergence(const float* reference, double reference_sum, const float* logits,
                                         double sum, std::int64_t count) {
    return lane_sum(count, [=](std::int64_t i) {
        const double expected = double{reference[i]} - reference_sum;
        return vector_exp(expected) * (expected - (double{logits[i]} - sum));
    });
}

QUANTMILL_HOT_LOOP double squared_row_distance(const float* a, const float* b, std::int64_t count) {
    return lane_sum(count, [=](std::int64_t i) {
        const double difference = double{a[i]} - double{b[i]};
        return difference * difference;
    });
}

// Calls range(begin, count) on pieces of [0, total), in parallel.
template <class Range>
void for_chunks(std::int64_t total, Range range) {
#pragma omp parallel for schedule(static)
    for (std::int64_t begin = 0; begin < total; begin += kChunk) {
        range(begin, std::min(kChunk, total - begin));
    }
}

template <class T>
void permute_columns_of(const T* x, std::int64_t rows, std::span<const std::int32_t> order, T* out) {
    const auto columns = static_cast<std::int64_t>(order.size());
#pragma omp parallel for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t c = 0; c < columns; ++c) {
            out[row * columns + c] = x[row * columns + order[c]];
        }
    }
}

}  // namespace

void CpuBackend::convert(ConstTensorView source, TensorView destination) {
    require_operands(source.shape().count() == destination.shape().count(), "convert", {source, destination});
    if (source.dtype() == destination.dtype()) return copy(source, destination);
    with_float_type(source.dtype(), "convert", [&]<class From>(From) {
        with_float_type(destination.dtype(), "convert", [&]<class To>(To) {
            const From* from = source.data<From>();
            To* to = destination.data<To>();
            for_chunks(source.shape().count(), [&](std::int64_t begin, std::int64_t count) {
                convert_hot(from + begin, to + begin, count);
            });
        });
    });
}

void CpuBackend::embed(std::span<const std::int32_t> ids, ConstTensorView table, TensorView out) {
    const bool matrix = table.shape().rank() == 2;
    const std::int64_t vocabulary = matrix ? table.extent(0) : 0;
    const std::int64_t columns = matrix ? table.extent(1) : 0;
    const auto tokens = static_cast<std::int64_t>(ids.size());
    require_operands(matrix && is(out, DType::f32, {tokens, columns}), "embed", {table, out});
    for (const std::int32_t id : ids) {
        if (id < 0 || id >= vocabulary) {
            throw InternalError("embed: token {} of a vocabulary of {}", id, vocabulary);
        }
    }
    auto* out_data = out.data<float>();
    with_float_type(table.dtype(), "embed", [&]<class T>(T) {
        const T* rows = table.data<T>();
#pragma omp parallel for schedule(static)
        for (std::int64_t t = 0; t < tokens; ++t) {
            convert_range(rows + ids[t] * columns, out_data + t * columns, columns);
        }
    });
}

void CpuBackend::rms_norm(ConstTensorView x, ConstTensorView weight, float eps, TensorView out) {
    const std::int64_t columns = weight.shape().rank() == 1 ? weight.extent(0) : 0;
    const std::int64_t rows = columns > 0 ? x.shape().count() / columns : 0;
    require_operands(columns > 0 && x.shape() == out.shape() && x.shape().count() == rows * columns &&
                         x.dtype() == DType::f32 && out.dtype() == DType::f32 && weight.dtype() == DType::f32,
                     "rms_norm", {x, weight, out});
    const auto* x_data = x.data<float>();
    const auto* weight_data = weight.data<float>();
    auto* out_data = out.data<float>();
#pragma omp parallel for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
        normalise_row(x_data + row * columns, weight_data, eps, columns, out_data + row * columns);
    }
}

void CpuBackend::add(ConstTensorView x, TensorView accumulated) {
    require_operands(x.dtype() == DType::f32 && is(accumulated, DType::f32, x.shape()), "add",
                     {x, accumulated});
    const auto* x_data = x.data<float>();
    auto* sum = accumulated.data<float>();
    for_chunks(x.shape().count(), [&](std::int64_t begin, std::int64_t count) {
        for (std::int64_t i = begin; i < begin + count; ++i) sum[i] += x_data[i];
    });
}

void CpuBackend::rope(TensorView x, const Sequences& sequences, ConstTensorView cos_sin) {
    const bool ranks_fit = x.shape().rank() == 3 && cos_sin.shape().rank() == 3;
    const std::int64_t heads = ranks_fit ? x.extent(1) : 0;
    const std::int64_t half = ranks_fit ? x.extent(2) / 2 : 0;
    const std::int64_t positions = ranks_fit ? cos_sin.extent(1) : 0;
    std::int64_t longest = 0;
    for (std::int64_t s = 0; s < sequences.count(); ++s) {
        longest = std::max<std::int64_t>(longest, sequences.offsets[s + 1] - sequences.offsets[s]);
    }
    require_operands(ranks_fit && is(x, DType::f32, {sequences.tokens(), heads, 2 * half}) &&
                         is(cos_sin, DType::f32, {2, positions, half}) && longest <= positions,
                     "rope", {x, cos_sin});
    const auto* cosines = cos_sin.data<float>();
    const auto* sines = cosines + positions * half;
    auto* x_data = x.data<float>();
#pragma omp parallel
    for (std::int64_t s = 0; s < sequences.count(); ++s) {
        const std::int64_t begin = sequences.offsets[s];
#pragma omp for schedule(static) nowait
        for (std::int64_t t = begin; t < sequences.offsets[s + 1]; ++t) {
            const std::int64_t angles = (t - begin) * half;
            for (std::int64_t h = 0; h < heads; ++h) {
                rotate_head(cosines + angles, sines + angles, half, x_data + (t * heads + h) * 2 * half);
            }
        }
    }
}

void CpuBackend::silu_mul(ConstTensorView gate, ConstTensorView up, TensorView out) {
    require_operands(
        gate.dtype() == DType::f32 && is(up, DType::f32, gate.shape()) && is(out, DType::f32, gate.shape()),
        "silu_mul", {gate, up, out});
    const auto* gate_data = gate.data<float>();
    const auto* up_data = up.data<float>();
    auto* out_data = out.data<float>();
    for_chunks(gate.shape().count(), [&](std::int64_t begin, std::int64_t count) {
        silu_mul_range(gate_data + begin, up_data + begin, count, out_data + begin);
    });
}

std::vector<double> CpuBackend::cross_entropy(ConstTensorView logits, std::span<const std::int32_t> targets) {
    const std::int64_t vocabulary = logits.shape().rank() == 2 ? logits.extent(1) : 0;
    const auto tokens = static_cast<std::int64_t>(targets.size());
    require_operands(vocabulary > 0 && is(logits, DType::f32, {tokens, vocabulary}), "cross_entropy",
                     {logits});
    for (const std::int32_t target : targets) {
        if (target < 0 || target >= vocabulary) {
            throw InternalError("cross_entropy: target {} of a vocabulary of {}", target, vocabulary);
        }
    }
    const auto* logits_data = logits.data<float>();
    std::vector<double> losses(targets.size());
#pragma omp parallel for schedule(static)
    for (std::int64_t t = 0; t < tokens; ++t) {
        const float* row = logits_data + t * vocabulary;
        losses[t] = log_sum_exp(row, vocabulary) - double{row[targets[t]]};
    }
    return losses;
}

std::vector<LogitDistance> CpuBackend::logit_distances(ConstTensorView reference, ConstTensorView logits) {
    const bool matrix = logits.shape().rank() == 2 && logits.extent(1) > 0;
    require_operands(matrix && logits.dtype() == DType::f32 && is(reference, DType::f32, logits.shape()),
                     "logit_distances", {reference, logits});
    const std::int64_t tokens = logits.extent(0);
    const std::int64_t vocabulary = logits.extent(1);
    const auto* reference_data = reference.data<float>();
    const auto* logits_data = logits.data<float>();
    std::vector<LogitDistance> distances(static_cast<std::size_t>(tokens));
#pragma omp parallel for schedule(static)
    for (std::int64_t t = 0; t < tokens; ++t) {
        const float* expected = reference_data + t * vocabulary;
        const float* row = logits_data + t * vocabulary;
        distances[t] = {row_divergence(expected, log_sum_exp(expected, vocabulary), row,
                                       log_sum_exp(row, vocabulary), vocabulary),
                        std::max_element(expected, expected + vocabulary) - expected ==
                            std::max_element(row, row + vocabulary) - row};
    }
    return distances;
}

void CpuBackend::permute_columns(ConstTensorView x, std::span<const std::int32_t> order, TensorView out) {
    const std::int64_t rows = x.shape().rank() == 2 ? x.extent(0) : 0;
    const auto columns = static_cast<std::int64_t>(order.size());
    require_operands(
        is(x, out.dtype(), {rows, columns}) && out.shape() == x.shape() && x.bytes() != out.bytes(),
        "permute_columns", {x, out});
    if (x.dtype() == DType::u8) {
        permute_columns_of(x.data<std::uint8_t>(), rows, order, out.data<std::uint8_t>());
    } else if (x.dtype() == DType::f16) {
        permute_columns_of(x.data<Half>(), rows, order, out.data<Half>());
    } else {
        permute_columns_of(x.data<float>(), rows, order, out.data<float>());
    }
}

void CpuBackend::zero_columns(std::span<const std::int32_t> columns, TensorView x) {
    require_operands(x.shape().rank() == 2 && x.dtype() == DType::f32, "zero_columns", {x});
    const std::int64_t rows = x.extent(0);
    const std::int64_t width = x.extent(1);
    for (const std::int32_t column : columns) {
        if (column < 0 || column >= width) {
            throw InternalError("zero_columns: column {} of {}", column, width);
        }
    }
    auto* x_data = x.data<float>();
#pragma omp parallel for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
        for (const std::int32_t column : columns) x_data[row * width + column] = 0.0F;
    }
}

std::vector<double> CpuBackend::squared_distance(ConstTensorView a, ConstTensorView b) {
    require_operands(a.shape().rank() == 2 && a.dtype() == DType::f32 && is(b, DType::f32, a.shape()),
                     "squared_distance", {a, b});
    const std::int64_t rows = a.extent(0);
    const std::int64_t width = a.extent(1);
    const auto* a_data = a.data<float>();
    const auto* b_data = b.data<float>();
    std::vector<double> distances(static_cast<std::size_t>(rows));
#pragma omp parallel for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
        distances[row] = squared_row_distance(a_data + row * width, b_data + row * width, width);
    }
    return distances;
}

void CpuBackend::dequantize(ConstQuantizedViews quantized, std::span<const std::int32_t> g_idx,
                            TensorView out) {
    const bool matrices = quantized.codes.shape().rank() == 2 && quantized.scales.shape().rank() == 2;
    const std::int64_t rows = matrices ? quantized.codes.extent(0) : 0;
    const std::int64_t groups = matrices ? quantized.scales.extent(1) : 0;
    const auto columns = static_cast<std::int64_t>(g_idx.size());
    require_operands(matrices && is(quantized.codes, DType::u8, {rows, columns}) &&
                         is(quantized.scales, DType::f16, {rows, groups}) &&
                         is(quantized.zeros, DType::u8, {rows, groups}) &&
                         is(out, DType::f32, {rows, columns}),
                     "dequantize", {quantized.codes, quantized.scales, quantized.zeros, out});
    for (const std::int32_t group : g_idx) {
        if (group < 0 || group >= groups) {
            throw InternalError("dequantize: group {} of {}", group, groups);
        }
    }
    const auto* codes = quantized.codes.data<std::uint8_t>();
    const auto* scales = quantized.scales.data<Half>();
    const auto* zeros = quantized.zeros.data<std::uint8_t>();
    auto* out_data = out.data<float>();
#pragma omp parallel for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t c = 0; c < columns; ++c) {
            const std::int64_t group = row * groups + g_idx[c];
            const int offset = int{codes[row * columns + c]} - int{zeros[group]};
            out_data[row * columns + c] = to_float(scales[group]) * static_cast<float>(offset);
        }
    }
}

}  // namespace quantmill
