#pragma once

#include <span>

#include "pipeline/batch_plan.h"
#include "pipeline/block_weights.h"
#include "pipeline/forward.h"
#include "pipeline/quantized_linear.h"
#include "workers/hidden_errors.h"

namespace quantmill {

// What quantizing one LinearGroup does to what its block puts out, on the job's first tokens. Measured where
// the residual stream is, errors of attention, of the MLP and of all blocks count alike (docs/quality.md).
class BlockProbe {
public:
    // Whole sequences, at least one, of the first micro-batch.
    static Sequences sequences_of(std::span<const BatchShard> shards);
    // Bytes that a rank takes for them, and those beside each block that it holds.
    static std::size_t scratch_bytes(const ModelGraph& graph, std::int64_t tokens, DType activation);
    static std::size_t block_bytes(const ModelGraph& graph, std::int64_t tokens, DType activation);

    BlockProbe(Backend& backend, const ModelGraph& graph, std::span<const BatchShard> shards);

    std::int64_t tokens() const { return sequences_.tokens(); }
    // Of a block with these weights and this input [T, hidden_size], which stays as it is.
    Tensor output(const BlockWeights& weights, ConstTensorView input);
    // The mean over tokens of ||h' − h||² / ||h||²: h is `output`, h' comes of the stage's linears with the
    // rows of `quantized`. `weights` are in the end what they were.
    double error(BlockWeights& weights, std::size_t stage, const QuantizedLinear& quantized,
                 ConstTensorView input, ConstTensorView output);

private:
    Backend& backend_;
    Sequences sequences_;
    BlockForward forward_;
    Tensor carried_;  // [T, carried_width]
    HiddenErrors errors_;
};

}  // namespace quantmill
