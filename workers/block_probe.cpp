#include "workers/block_probe.h"

#include <utility>

#include "workers/calibration_batches.h"

namespace quantmill {
namespace {

// Enough: on SmolLM2 errors over 512 tokens predict the divergence of the model's outputs (docs/quality.md).
constexpr std::int64_t kTokens = 1024;

}  // namespace

Sequences BlockProbe::sequences_of(std::span<const BatchShard> shards) {
    const std::vector<std::int32_t>& offsets = shards.front().micro_batches.front().sequences.offsets;
    Sequences first;
    for (std::size_t s = 1; s < offsets.size() && (s == 1 || offsets[s] <= kTokens); ++s) {
        first.offsets.push_back(offsets[s]);
    }
    return first;
}

std::size_t BlockProbe::scratch_bytes(const ModelGraph& graph, std::int64_t tokens, DType activation) {
    const std::int64_t width = BlockForward::carried_width(graph) + graph.hidden_size;
    return BlockForward::scratch_bytes(graph, tokens, activation) +
           static_cast<std::size_t>(tokens * width) * size_of(activation);
}

std::size_t BlockProbe::block_bytes(const ModelGraph& graph, std::int64_t tokens, DType activation) {
    return static_cast<std::size_t>(2 * tokens * graph.hidden_size) * size_of(activation);
}

BlockProbe::BlockProbe(Backend& backend, const ModelGraph& graph, std::span<const BatchShard> shards)
    : backend_(backend),
      sequences_(sequences_of(shards)),
      forward_(backend, graph, sequences_.tokens(), limits_of(shards).length),
      carried_(backend, {sequences_.tokens(), BlockForward::carried_width(graph)}, backend.activation_dtype(),
               "inputs carried between stages"),
      errors_(backend, graph.hidden_size) {}

Tensor BlockProbe::output(const BlockWeights& weights, ConstTensorView input) {
    Tensor hidden = backend_.empty(input.shape(), input.dtype(), "hidden states of the first tokens");
    backend_.copy(input, hidden);
    forward_.run_block(weights, {&sequences_, hidden, carried_});
    return hidden;
}

double BlockProbe::error(BlockWeights& weights, std::size_t stage, const QuantizedLinear& quantized,
                         ConstTensorView input, ConstTensorView output) {
    std::vector<LinearWeights>& linears = weights.stages[stage];
    std::vector<Tensor> originals;
    std::int64_t row = 0;
    for (LinearWeights& linear : linears) {
        const std::int64_t rows = linear.forward.shape()[0];
        originals.push_back(
            std::exchange(linear.forward, forward_weights(backend_, quantized, row, row + rows)));
        row += rows;
    }
    const Tensor moved = this->output(weights, input);
    for (std::size_t l = 0; l < linears.size(); ++l) linears[l].forward = std::move(originals[l]);

    double sum = 0.0;
    errors_.each(moved, output, [&](std::size_t, double error, double square) {
        sum += square > 0.0 ? error / square : 0.0;
    });
    return sum / static_cast<double>(sequences_.tokens());
}

}  // namespace quantmill
