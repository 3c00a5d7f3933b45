#include "workers/logit_head.h"

namespace quantmill {

LogitHead::LogitHead(Backend& backend, WeightLoader& loader, const ModelGraph& graph)
    : backend_(backend),
      graph_(graph),
      weights_(loader.load_block_for_forward(graph.blocks)),
      normed_(backend, {kRows, graph.hidden_size}, backend.activation_dtype(), "normed hidden states"),
      logits_(backend, {kRows, graph.vocab_size}, DType::f32, "logits") {}

TensorView LogitHead::logits(ConstTensorView hidden) {
    const std::int64_t rows = hidden.extent(0);
    const TensorView normed = normed_.view().leading({rows, graph_.hidden_size});
    const TensorView logits = logits_.view().leading({rows, graph_.vocab_size});
    backend_.rms_norm(hidden, weights_.norms.at(graph_.final_norm), graph_.norm_eps, normed);
    backend_.linear(normed, weights_.stages.front().front().forward, {}, logits);
    return logits;
}

LogitFile::LogitFile(const std::filesystem::path& path, std::int64_t tokens, std::int64_t vocab)
    : file_(path) {
    std::vector<StoredTensor> tensors{{"logits", "F32", {tokens, vocab}, 0, 0}};
    tensors.front().end = static_cast<std::uint64_t>(tokens * vocab) * sizeof(float);
    const std::string header = make_safetensors_header(tensors, {});
    file_.write(0, header.data(), header.size());
    offset_ = header.size();
}

void LogitFile::append(Backend& backend, ConstTensorView logits) {
    std::vector<std::byte> bytes(logits.size_bytes());
    backend.copy_to_host(logits, bytes.data());
    file_.write(offset_, bytes.data(), bytes.size());
    offset_ += bytes.size();
}

}  // namespace quantmill
