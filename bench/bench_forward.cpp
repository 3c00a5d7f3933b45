// A whole block's forward pass on random weights. It is checked on a short sequence against the same block
// written plainly in double precision. Attention counts the visible half of its products.
#include <nlohmann/json.hpp>

#include "bench/bench_common.h"
#include "pipeline/forward.h"

namespace quantmill::bench {
namespace {

using Matrix = std::vector<double>;  // row-major

ModelGraph graph_of(std::int64_t hidden, std::int64_t intermediate, std::int64_t heads,
                    std::int64_t kv_heads) {
    const nlohmann::json config = {{"architectures", {"LlamaForCausalLM"}},
                                   {"hidden_size", hidden},
                                   {"intermediate_size", intermediate},
                                   {"num_attention_heads", heads},
                                   {"num_key_value_heads", kv_heads},
                                   {"num_hidden_layers", 1},
                                   {"vocab_size", 32},
                                   {"rms_norm_eps", 1e-5}};
    return build_model_graph(config, "bench");
}

BlockWeights random_weights(Bench& bench, const ModelGraph& graph) {
    BlockWeights weights;
    for (const auto& [name, length] : graph.norms()) weights.norms.emplace(name, bench.normal({length}));
    for (const Stage& stage : graph.stages) {
        auto& group = weights.stages.emplace_back();
        for (const Linear& linear : stage.group.linears) {
            const float deviation = 1.0F / std::sqrt(static_cast<float>(linear.columns));
            group.push_back({{}, {}, bench.normal({linear.rows, linear.columns}, deviation), {}});
        }
    }
    return weights;
}

Matrix norm(const Matrix& x, const Tensor& weight, std::size_t width) {
    Matrix out(x.size());
    for (std::size_t row = 0; row < x.size(); row += width) {
        double squares = 0.0;
        for (std::size_t i = 0; i < width; ++i) squares += x[row + i] * x[row + i];
        const double scale = 1.0 / std::sqrt(squares / static_cast<double>(width) + 1e-5);
        for (std::size_t i = 0; i < width; ++i) {
            out[row + i] = x[row + i] * scale * double{weight.view().data<float>()[i]};
        }
    }
    return out;
}

Matrix multiply(const Matrix& x, const Tensor& weight) {
    const auto rows = static_cast<std::size_t>(weight.shape()[0]);
    const auto columns = static_cast<std::size_t>(weight.shape()[1]);
    Matrix out(x.size() / columns * rows);
    for (std::size_t t = 0; t < x.size() / columns; ++t) {
        for (std::size_t r = 0; r < rows; ++r) {
            double sum = 0.0;
            for (std::size_t c = 0; c < columns; ++c) {
                sum += x[t * columns + c] * double{weight.view().data<float>()[r * columns + c]};
            }
            out[t * rows + r] = sum;
        }
    }
    return out;
}

void rotate(Matrix& x, const ModelGraph& graph, std::size_t heads) {
    const std::size_t half = graph.inverse_frequencies.size();
    for (std::size_t row = 0; row < x.size() / (2 * half); ++row) {
        const std::size_t token = row / heads;
        for (std::size_t i = 0; i < half; ++i) {
            const double angle = static_cast<double>(token) * double{graph.inverse_frequencies[i]};
            double& first = x[row * 2 * half + i];
            double& second = x[row * 2 * half + half + i];
            const double old = first;
            first = old * std::cos(angle) - second * std::sin(angle);
            second = second * std::cos(angle) + old * std::sin(angle);
        }
    }
}

// One sequence; rows of q are tokens by heads.
Matrix attend(const Matrix& q, const Matrix& k, const Matrix& v, const Attention& shape) {
    const auto heads = static_cast<std::size_t>(shape.heads),
               kv_heads = static_cast<std::size_t>(shape.kv_heads);
    const auto width = static_cast<std::size_t>(shape.head_dim);
    Matrix out(q.size());
    for (std::size_t row = 0; row < q.size() / width; ++row) {
        const std::size_t token = row / heads;
        const std::size_t kv = row % heads / (heads / kv_heads);
        Matrix weights(token + 1);
        double total = 0.0;
        for (std::size_t s = 0; s <= token; ++s) {
            double score = 0.0;
            for (std::size_t i = 0; i < width; ++i)
                score += q[row * width + i] * k[(s * kv_heads + kv) * width + i];
            weights[s] = std::exp(score / std::sqrt(static_cast<double>(width)));
            total += weights[s];
        }
        for (std::size_t s = 0; s <= token; ++s) {
            for (std::size_t i = 0; i < width; ++i) {
                out[row * width + i] += weights[s] / total * v[(s * kv_heads + kv) * width + i];
            }
        }
    }
    return out;
}

void add(const Matrix& x, Matrix& sum) {
    for (std::size_t i = 0; i < x.size(); ++i) sum[i] += x[i];
}

Matrix reference(Matrix hidden, const ModelGraph& graph, const BlockWeights& weights) {
    const auto width = static_cast<std::size_t>(graph.hidden_size);
    const auto linear = [&](std::size_t stage, std::size_t index, const Matrix& x) {
        return multiply(x, weights.stages[stage][index].forward);
    };
    const Matrix x = norm(hidden, weights.norms.at("input_layernorm.weight"), width);
    Matrix q = linear(0, 0, x), k = linear(0, 1, x);
    rotate(q, graph, static_cast<std::size_t>(graph.attention.heads));
    rotate(k, graph, static_cast<std::size_t>(graph.attention.kv_heads));
    add(linear(1, 0, attend(q, k, linear(0, 2, x), graph.attention)), hidden);
    const Matrix y = norm(hidden, weights.norms.at("post_attention_layernorm.weight"), width);
    Matrix gate = linear(2, 0, y);
    const Matrix up = linear(2, 1, y);
    for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1.0 + std::exp(-gate[i])) * up[i];
    add(linear(3, 0, gate), hidden);
    return hidden;
}

double check(Bench& bench, const ModelGraph& graph, const BlockWeights& weights) {
    constexpr std::int64_t kTokens = 24;
    const Sequences sequences{{0, kTokens}};
    const Tensor hidden = bench.normal({kTokens, graph.hidden_size});
    const auto* data = hidden.view().data<float>();
    const Matrix expected = reference({data, data + hidden.shape().count()}, graph, weights);

    Tensor result = bench.empty(hidden.shape());
    Tensor carried = bench.empty({kTokens, BlockForward::carried_width(graph)});
    bench.backend().copy(hidden, result);
    BlockForward(bench.backend(), graph, kTokens, kTokens).run_block(weights, {&sequences, result, carried});
    double error = 0.0, size = 0.0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        error += std::pow(double{result.view().data<float>()[i]} - expected[i], 2);
        size += std::pow(expected[i], 2);
    }
    return std::sqrt(error / size);
}

void block(Bench& bench, const std::string& model, const ModelGraph& graph, std::int64_t length) {
    const std::string shape = fmt::format("{} 2048 = {} x {}", model, 2048 / length, length);
    if (!bench.wanted("forward", shape)) return;
    const BlockWeights weights = random_weights(bench, graph);
    const double error = check(bench, graph, weights);
    const std::int64_t tokens = bench.backend().micro_batch_tokens();
    Sequences sequences;
    for (std::int64_t token = length; token <= tokens; token += length) {
        sequences.offsets.push_back(static_cast<std::int32_t>(token));
    }
    Tensor hidden = bench.normal({tokens, graph.hidden_size});
    Tensor carried = bench.empty({tokens, BlockForward::carried_width(graph)});
    BlockForward forward(bench.backend(), graph, tokens, length);
    const Attention& attention = graph.attention;
    const double work =
        static_cast<double>(tokens) *
        static_cast<double>(2 * graph.block_parameters() + 2 * length * attention.heads * attention.head_dim);
    bench.measure({"forward", shape, work, Unit::flop, error, 1e-5},
                  [&] { forward.run_block(weights, {&sequences, hidden, carried}); });
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_bench(argc, argv, "Forward pass of a block", [](Bench& bench) {
        block(bench, "SmolLM2-135M", graph_of(576, 1536, 9, 3), 512);
        block(bench, "SmolLM2-135M", graph_of(576, 1536, 9, 3), 2048);
        block(bench, "Llama-3.2-1B", graph_of(2048, 8192, 32, 8), 2048);
    });
}
