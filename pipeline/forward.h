#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "pipeline/batch_plan.h"
#include "pipeline/block_weights.h"
#include "pipeline/model_graph.h"

namespace quantmill {

// What lives between the stages of a block for the tokens of one micro-batch.
struct BatchState {
    const Sequences* sequences = nullptr;
    TensorView hidden;      // [T, hidden_size], activation dtype: the residual stream
    TensorView carried;     // [T, carried_width]: input of the next stage when it is not a norm of `hidden`
    bool original = false;  // on the original path: multiplies with LinearWeights::original
};

// Runs the stages of a block one at a time, so that the caller can look at a stage's input and replace its
// weights before they are used.
class BlockForward {
public:
    // Scratch for micro-batches of at most max_tokens tokens and sequences of at most max_length.
    BlockForward(Backend& backend, const ModelGraph& graph, std::int64_t max_tokens, std::int64_t max_length);

    // The input [T, C] of a stage's linears; valid until the next call.
    TensorView stage_input(const Stage& stage, const BlockWeights& weights, const BatchState& state);
    // Applies the linears of stage `index`, then prepares what the next stage needs. `input` is
    // stage_input's.
    void run_stage(std::size_t index, ConstTensorView input, const BlockWeights& weights,
                   const BatchState& state);
    // All stages.
    void run_block(const BlockWeights& weights, const BatchState& state);

    // Widest input that is carried between stages: the width of BatchState::carried.
    static std::int64_t carried_width(const ModelGraph& graph);
    static std::size_t scratch_bytes(const ModelGraph& graph, std::int64_t max_tokens, DType activation);

private:
    void attention(const BlockWeights& weights, const BatchState& state, TensorView out);
    TensorView output(std::size_t linear, std::int64_t tokens, std::int64_t rows);

    Backend& backend_;
    const ModelGraph& graph_;
    Tensor cos_sin_;               // f32 [2, max_length, head_dim / 2]
    Tensor normed_;                // [max_tokens, hidden_size]
    std::vector<Tensor> outputs_;  // [linear of a group]: [max_tokens, widest rows]
};

}  // namespace quantmill
