#pragma once

#include <cstdint>
#include <filesystem>

#include "pipeline/block_weights.h"
#include "pipeline/files.h"

namespace quantmill {

// A model's last steps: final norm and lm_head.
class LogitHead {
public:
    static constexpr std::int64_t kRows = 256;  // logits [256, V] fit any memory

    // Collective, as loading weights is.
    LogitHead(Backend& backend, WeightLoader& loader, const ModelGraph& graph);

    // Logits f32 [rows, V] of hidden states [rows, hidden_size], at most kRows; valid until the next call.
    TensorView logits(ConstTensorView hidden);

private:
    Backend& backend_;
    const ModelGraph& graph_;
    BlockWeights weights_;  // of block number graph.blocks
    Tensor normed_, logits_;
};

// Writes f32 logits [tokens of the job, V] as one safetensors file; ranks do not share it, so one rank only.
class LogitFile {
public:
    LogitFile(const std::filesystem::path& path, std::int64_t tokens, std::int64_t vocab);
    void append(Backend& backend, ConstTensorView logits);
    void finish() { file_.finish(); }

private:
    OutputFile file_;
    std::uint64_t offset_ = 0;
};

}  // namespace quantmill
