#include <algorithm>
#include <climits>
#include <cstdint>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/error.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

void require_below(std::span<const std::int32_t> values, std::int64_t limit, std::string_view what) {
    for (const std::int32_t value : values) {
        if (value < 0 || value >= limit) throw InternalError("{}: {} of {}", what, value, limit);
    }
}

std::int64_t longest_of(const Sequences& sequences) {
    std::int64_t longest = 0;
    for (std::int64_t s = 0; s < sequences.count(); ++s) {
        longest = std::max<std::int64_t>(longest, sequences.offsets[s + 1] - sequences.offsets[s]);
    }
    return longest;
}

template <class T>
const T* elements(const ConstTensorView& view) {
    return reinterpret_cast<const T*>(view.bytes());
}
template <class T>
T* elements(const TensorView& view) {
    return reinterpret_cast<T*>(view.bytes());
}

}  // namespace

void CudaBackend::convert(ConstTensorView source, TensorView destination) {
    require_operands(source.shape().count() == destination.shape().count(), "convert", {source, destination});
    if (source.dtype() == destination.dtype()) return copy(source, destination);
    require_operands(is_float(source.dtype()) && is_float(destination.dtype()), "convert",
                     {source, destination});
    cuda::convert(source.bytes(), source.dtype(), destination.bytes(), destination.dtype(),
                  source.shape().count(), stream_);
}

void CudaBackend::embed(std::span<const std::int32_t> ids, ConstTensorView table, TensorView out) {
    const bool matrix = table.shape().rank() == 2 && is_float(table.dtype());
    const std::int64_t columns = matrix ? table.extent(1) : 0;
    const auto tokens = static_cast<std::int64_t>(ids.size());
    require_operands(matrix && is(out, DType::bf16, {tokens, columns}), "embed", {table, out});
    require_below(ids, table.extent(0), "embed: token");
    const Tensor device_ids = upload(ids, "token ids");
    cuda::embed(elements<std::int32_t>(device_ids.view()), table.bytes(), table.dtype(), tokens, columns,
                out.bytes(), stream_);
}

void CudaBackend::rms_norm(ConstTensorView x, ConstTensorView weight, float eps, TensorView out) {
    const std::int64_t columns = weight.shape().rank() == 1 ? weight.extent(0) : 0;
    const std::int64_t rows = columns > 0 ? x.shape().count() / columns : 0;
    require_operands(columns > 0 && is(out, DType::bf16, x.shape()) && x.dtype() == DType::bf16 &&
                         x.shape().count() == rows * columns && weight.dtype() == DType::f32,
                     "rms_norm", {x, weight, out});
    cuda::rms_norm(x.bytes(), elements<float>(weight), eps, rows, columns, out.bytes(), stream_);
}

void CudaBackend::linear(ConstTensorView x, ConstTensorView weight, ConstTensorView bias, TensorView out) {
    const bool matrices = x.shape().rank() == 2 && weight.shape().rank() == 2;
    const std::int64_t tokens = matrices ? x.extent(0) : 0;
    const std::int64_t columns = matrices ? x.extent(1) : 0;
    const std::int64_t outputs = matrices ? weight.extent(0) : 0;
    const bool fit = matrices && x.dtype() == DType::bf16 && is(weight, DType::bf16, {outputs, columns}) &&
                     (bias.empty() || is(bias, DType::f32, {outputs})) &&
                     (is(out, DType::bf16, {tokens, outputs}) || is(out, DType::f32, {tokens, outputs}));
    require_operands(fit, "linear", {x, weight, bias, out});
    gemm_->run({.input = CUDA_R_16BF,
                .output = out.dtype() == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F,
                .rows = tokens,
                .columns = outputs,
                .depth = columns,
                .ldx = columns,
                .ldy = columns,
                .ldd = outputs,
                .y_by_columns = true,
                .rows_vary = true},
               {x.bytes(), weight.bytes(), out.bytes(), out.bytes()}, stream_);
    if (!bias.empty()) {
        cuda::add_bias(elements<float>(bias), tokens, outputs, out.dtype(), out.bytes(), stream_);
    }
}

void CudaBackend::add(ConstTensorView x, TensorView accumulated) {
    require_operands(x.dtype() == DType::bf16 && is(accumulated, DType::bf16, x.shape()), "add",
                     {x, accumulated});
    cuda::add(x.bytes(), accumulated.bytes(), x.shape().count(), stream_);
}

void CudaBackend::rope(TensorView x, const Sequences& sequences, ConstTensorView cos_sin) {
    const bool ranks_fit = x.shape().rank() == 3 && cos_sin.shape().rank() == 3;
    const std::int64_t heads = ranks_fit ? x.extent(1) : 0;
    const std::int64_t half = ranks_fit ? x.extent(2) / 2 : 0;
    const std::int64_t positions = ranks_fit ? cos_sin.extent(1) : 0;
    require_operands(ranks_fit && is(x, DType::bf16, {sequences.tokens(), heads, 2 * half}) &&
                         is(cos_sin, DType::f32, {2, positions, half}) && longest_of(sequences) <= positions,
                     "rope", {x, cos_sin});
    const Tensor offsets = upload(std::span(sequences.offsets), "sequence offsets");
    cuda::rope(x.bytes(), elements<std::int32_t>(offsets.view()), static_cast<int>(sequences.count()),
               sequences.tokens(), static_cast<int>(heads), static_cast<int>(2 * half),
               elements<float>(cos_sin), positions, stream_);
}

void CudaBackend::attention(ConstTensorView q, ConstTensorView k, ConstTensorView v,
                            const Sequences& sequences, const AttentionOptions& options, TensorView out) {
    const bool ranks_fit = q.shape().rank() == 3 && k.shape().rank() == 3;
    const std::int64_t heads = ranks_fit ? q.extent(1) : 0;
    const std::int64_t kv_heads = ranks_fit ? k.extent(1) : 0;
    const std::int64_t width = ranks_fit ? q.extent(2) : 0;
    const std::int64_t tokens = sequences.tokens();
    require_operands(ranks_fit && kv_heads > 0 && heads % kv_heads == 0 &&
                         is(q, DType::bf16, {tokens, heads, width}) &&
                         is(k, DType::bf16, {tokens, kv_heads, width}) && is(v, DType::bf16, k.shape()) &&
                         is(out, DType::bf16, q.shape()),
                     "attention", {q, k, v, out});
    if (width % 8 != 0 || width > cuda::kWidestHead) {
        throw InternalError(
            "attention on CUDA needs a head dimension that is a multiple of 8 and at "
            "most {}, not {}",
            cuda::kWidestHead, width);
    }
    if (tokens == 0) return;
    const Tensor offsets = upload(std::span(sequences.offsets), "sequence offsets");
    const auto window = options.window > 0 ? std::min<std::int64_t>(options.window, INT_MAX) : INT_MAX;
    cuda::attention({.sequences = static_cast<int>(sequences.count()),
                     .longest = static_cast<int>(longest_of(sequences)),
                     .heads = static_cast<int>(heads),
                     .kv_heads = static_cast<int>(kv_heads),
                     .head_dim = static_cast<int>(width),
                     .scale = options.scale,
                     .window = static_cast<int>(window)},
                    q.bytes(), k.bytes(), v.bytes(), elements<std::int32_t>(offsets.view()), out.bytes(),
                    stream_);
}

void CudaBackend::silu_mul(ConstTensorView gate, ConstTensorView up, TensorView out) {
    require_operands(gate.dtype() == DType::bf16 && is(up, DType::bf16, gate.shape()) &&
                         is(out, DType::bf16, gate.shape()),
                     "silu_mul", {gate, up, out});
    cuda::silu_mul(gate.bytes(), up.bytes(), out.bytes(), gate.shape().count(), stream_);
}

std::vector<double> CudaBackend::cross_entropy(ConstTensorView logits,
                                               std::span<const std::int32_t> targets) {
    const std::int64_t vocabulary = logits.shape().rank() == 2 ? logits.extent(1) : 0;
    const auto tokens = static_cast<std::int64_t>(targets.size());
    require_operands(vocabulary > 0 && is(logits, DType::f32, {tokens, vocabulary}), "cross_entropy",
                     {logits});
    require_below(targets, vocabulary, "cross_entropy: target");
    const Tensor device_targets = upload(targets, "cross-entropy targets");
    Tensor losses = empty({tokens}, DType::f64, "cross-entropy losses");
    cuda::cross_entropy(elements<float>(logits), elements<std::int32_t>(device_targets.view()), tokens,
                        vocabulary, elements<double>(losses.view()), stream_);
    return download<double>(losses);
}

std::vector<LogitDistance> CudaBackend::logit_distances(ConstTensorView reference, ConstTensorView logits) {
    const bool matrix = logits.shape().rank() == 2 && logits.extent(1) > 0;
    require_operands(matrix && logits.dtype() == DType::f32 && is(reference, DType::f32, logits.shape()),
                     "logit_distances", {reference, logits});
    const std::int64_t tokens = logits.extent(0);
    Tensor divergence = empty({tokens}, DType::f64, "divergences");
    Tensor same_top = empty({tokens}, DType::f64, "top-1 agreement");
    cuda::logit_distances(elements<float>(reference), elements<float>(logits), tokens, logits.extent(1),
                          elements<double>(divergence.view()), elements<double>(same_top.view()), stream_);
    const std::vector<double> divergences = download<double>(divergence);
    const std::vector<double> same = download<double>(same_top);
    std::vector<LogitDistance> distances(divergences.size());
    for (std::size_t t = 0; t < distances.size(); ++t) distances[t] = {divergences[t], same[t] != 0.0};
    return distances;
}

void CudaBackend::permute_columns(ConstTensorView x, std::span<const std::int32_t> order, TensorView out) {
    const std::int64_t rows = x.shape().rank() == 2 ? x.extent(0) : 0;
    const auto columns = static_cast<std::int64_t>(order.size());
    require_operands(is(x, out.dtype(), {rows, columns}) && out.shape() == x.shape() &&
                         (x.dtype() == DType::f32 || x.dtype() == DType::f16 || x.dtype() == DType::u8) &&
                         x.bytes() != out.bytes(),
                     "permute_columns", {x, out});
    require_below(order, columns, "permute_columns: column");
    const Tensor device_order = upload(order, "column order");
    cuda::permute_columns(x.bytes(), x.dtype(), elements<std::int32_t>(device_order.view()), rows, columns,
                          out.bytes(), stream_);
}

void CudaBackend::zero_columns(std::span<const std::int32_t> columns, TensorView x) {
    require_operands(x.shape().rank() == 2 && x.dtype() == DType::f32, "zero_columns", {x});
    require_below(columns, x.extent(1), "zero_columns: column");
    if (columns.empty()) return;
    const Tensor which = upload(columns, "columns to clear");
    cuda::zero_columns(elements<std::int32_t>(which.view()), static_cast<std::int64_t>(columns.size()),
                       x.extent(0), x.extent(1), elements<float>(x), stream_);
}

std::vector<double> CudaBackend::squared_distance(ConstTensorView a, ConstTensorView b) {
    require_operands(a.shape().rank() == 2 && a.dtype() == DType::f32 && is(b, DType::f32, a.shape()),
                     "squared_distance", {a, b});
    Tensor distances = empty({a.extent(0)}, DType::f64, "squared distances");
    cuda::squared_distance(elements<float>(a), elements<float>(b), a.extent(0), a.extent(1),
                           elements<double>(distances.view()), stream_);
    return download<double>(distances);
}

void CudaBackend::dequantize(ConstQuantizedViews quantized, std::span<const std::int32_t> g_idx,
                             TensorView out) {
    const bool matrices = quantized.codes.shape().rank() == 2 && quantized.scales.shape().rank() == 2;
    const std::int64_t rows = matrices ? quantized.codes.extent(0) : 0;
    const std::int64_t groups = matrices ? quantized.scales.extent(1) : 0;
    const auto columns = static_cast<std::int64_t>(g_idx.size());
    require_operands(matrices && is(quantized.codes, DType::u8, {rows, columns}) &&
                         is(quantized.scales, DType::f16, {rows, groups}) &&
                         is(quantized.zeros, DType::u8, {rows, groups}) &&
                         (is(out, DType::f32, {rows, columns}) || is(out, DType::bf16, {rows, columns})),
                     "dequantize", {quantized.codes, quantized.scales, quantized.zeros, out});
    require_below(g_idx, groups, "dequantize: group");
    const Tensor device_groups = upload(g_idx, "g_idx");
    cuda::dequantize(elements<std::uint8_t>(quantized.codes), quantized.scales.bytes(),
                     elements<std::uint8_t>(quantized.zeros), elements<std::int32_t>(device_groups.view()),
                     rows, columns, groups, out.dtype(), out.bytes(), stream_);
}

}  // namespace quantmill
