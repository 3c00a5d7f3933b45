#include "pipeline/forward.h"

#include <algorithm>
#include <cmath>

namespace quantmill {
namespace {

// Rows of the widest linear at each position of a group: what the output scratch must hold.
std::vector<std::int64_t> output_widths(const ModelGraph& graph) {
    std::vector<std::int64_t> widths;
    for (const Stage& stage : graph.stages) {
        const auto& linears = stage.group.linears;
        widths.resize(std::max(widths.size(), linears.size()), 0);
        for (std::size_t l = 0; l < linears.size(); ++l) widths[l] = std::max(widths[l], linears[l].rows);
    }
    return widths;
}

// Angles in single precision, as transformers computes them.
std::vector<float> cosines_and_sines(const std::vector<float>& frequencies, std::int64_t positions) {
    const std::size_t half = frequencies.size();
    const auto count = static_cast<std::size_t>(positions);
    std::vector<float> table(2 * count * half);
    for (std::size_t p = 0; p < count; ++p) {
        for (std::size_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(p) * frequencies[i];
            table[p * half + i] = std::cos(angle);
            table[(count + p) * half + i] = std::sin(angle);
        }
    }
    return table;
}

}  // namespace

BlockForward::BlockForward(Backend& backend, const ModelGraph& graph, std::int64_t max_tokens,
                           std::int64_t max_length)
    : backend_(backend),
      graph_(graph),
      cos_sin_(backend, {2, max_length, graph.attention.head_dim / 2}, DType::f32, "rotary embedding"),
      normed_(backend, {max_tokens, graph.hidden_size}, backend.activation_dtype(), "normed hidden states") {
    backend_.copy_from_host(cosines_and_sines(graph.inverse_frequencies, max_length).data(), cos_sin_);
    for (const std::int64_t width : output_widths(graph)) {
        outputs_.push_back(
            backend.empty({max_tokens, width}, backend.activation_dtype(), "outputs of a linear group"));
    }
}

std::int64_t BlockForward::carried_width(const ModelGraph& graph) {
    std::int64_t width = 0;
    for (const Stage& stage : graph.stages) {
        if (stage.input != StageInput::norm) width = std::max(width, stage.group.columns());
    }
    return width;
}

std::size_t BlockForward::scratch_bytes(const ModelGraph& graph, std::int64_t max_tokens, DType activation) {
    std::int64_t width = graph.hidden_size;
    for (const std::int64_t rows : output_widths(graph)) width += rows;
    return static_cast<std::size_t>(max_tokens * width) * size_of(activation);
}

TensorView BlockForward::output(std::size_t linear, std::int64_t tokens, std::int64_t rows) {
    return outputs_[linear].view().leading({tokens, rows});
}

TensorView BlockForward::stage_input(const Stage& stage, const BlockWeights& weights,
                                     const BatchState& state) {
    const std::int64_t tokens = state.hidden.extent(0);
    if (stage.input != StageInput::norm) return state.carried.leading({tokens, stage.group.columns()});
    const TensorView normed = normed_.view().leading({tokens, graph_.hidden_size});
    backend_.rms_norm(state.hidden, weights.norms.at(stage.norm), graph_.norm_eps, normed);
    return normed;
}

void BlockForward::attention(const BlockWeights& weights, const BatchState& state, TensorView out) {
    const Attention& shape = graph_.attention;
    const std::int64_t tokens = state.hidden.extent(0);
    const auto heads_of = [&](std::size_t linear, std::int64_t heads) {
        return output(linear, tokens, heads * shape.head_dim).reshaped({tokens, heads, shape.head_dim});
    };
    const TensorView q = heads_of(0, shape.heads);
    const TensorView k = heads_of(1, shape.kv_heads);
    const TensorView v = heads_of(2, shape.kv_heads);
    if (shape.qk_norm) {
        const auto norm_heads = [&](const char* name, TensorView x) {
            const TensorView rows = x.reshaped({x.extent(0) * x.extent(1), shape.head_dim});
            backend_.rms_norm(rows, weights.norms.at(name), graph_.norm_eps, rows);
        };
        norm_heads("self_attn.q_norm.weight", q);
        norm_heads("self_attn.k_norm.weight", k);
    }
    backend_.rope(q, *state.sequences, cos_sin_);
    backend_.rope(k, *state.sequences, cos_sin_);
    const AttentionOptions options{1.0F / std::sqrt(static_cast<float>(shape.head_dim)), shape.window};
    backend_.attention(q, k, v, *state.sequences, options, out.reshaped(q.shape()));
}

void BlockForward::run_stage(std::size_t index, ConstTensorView input, const BlockWeights& weights,
                             const BatchState& state) {
    const Stage& stage = graph_.stages[index];
    const std::int64_t tokens = input.extent(0);
    for (std::size_t l = 0; l < stage.group.linears.size(); ++l) {
        const LinearWeights& linear = weights.stages[index][l];
        backend_.linear(input, state.original ? linear.original : linear.forward, linear.bias,
                        output(l, tokens, stage.group.linears[l].rows));
    }
    if (stage.residual) {
        backend_.add(output(0, tokens, stage.group.rows()), state.hidden);
        return;
    }
    const Stage& next = graph_.stages[index + 1];
    const TensorView carried = state.carried.leading({tokens, next.group.columns()});
    if (next.input == StageInput::attention) {
        attention(weights, state, carried);
    } else {
        const std::int64_t width = next.group.columns();
        backend_.silu_mul(output(0, tokens, width), output(1, tokens, width), carried);
    }
}

void BlockForward::run_block(const BlockWeights& weights, const BatchState& state) {
    for (std::size_t s = 0; s < graph_.stages.size(); ++s) {
        run_stage(s, stage_input(graph_.stages[s], weights, state), weights, state);
    }
}

}  // namespace quantmill
