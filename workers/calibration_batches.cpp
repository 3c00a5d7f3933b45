#include "workers/calibration_batches.h"

#include <spdlog/spdlog.h>

#include <algorithm>

namespace quantmill {

std::size_t first_of_pass(const ModelGraph& graph, std::size_t stage, bool keeps_carried) {
    while (!keeps_carried && graph.stages[stage].input != StageInput::norm) --stage;
    return stage;
}

StateUse use_of_input(const ModelGraph& graph, std::size_t stage) {
    if (graph.stages[stage].input == StageInput::norm) return {.reads_hidden = true};
    return {.reads_carried = graph.stages[stage].group.columns()};
}

StateUse use_of_stages(const ModelGraph& graph, std::size_t first, std::size_t last) {
    StateUse use = use_of_input(graph, first);
    for (std::size_t stage = first; stage < last; ++stage) {
        // A residual stage adds to the hidden states that it found.
        if (graph.stages[stage].residual) use.reads_hidden = use.writes_hidden = true;
    }
    if (!graph.stages[last - 1].residual) use.writes_carried = graph.stages[last].group.columns();
    return use;
}

bool keeps_result(const ModelGraph& graph, std::size_t last, bool keeps_carried) {
    return keeps_carried || graph.stages[last - 1].residual;
}

StateUse use_of_original(const ModelGraph& graph, std::size_t first, std::size_t last, bool keeps_carried) {
    const std::size_t begin = first_of_pass(graph, first, keeps_carried);
    return keeps_result(graph, last, keeps_carried) ? use_of_stages(graph, begin, last)
                                                    : use_of_input(graph, begin);
}

CalibrationBatches::CalibrationBatches(Backend& backend, const ModelGraph& graph,
                                       std::span<const BatchShard> shards,
                                       const ActivationPlacement& placement)
    : backend_(backend),
      hidden_width_(graph.hidden_size),
      carried_width_(placement.keeps_carried ? BlockForward::carried_width(graph) : 0),
      lane_(backend.make_copy_lane()) {
    std::int64_t tokens = 0;
    for (const BatchShard& shard : shards) {
        for (const MicroBatch& batch : shard.micro_batches) {
            batches_.push_back({batch, tokens});
            tokens += batch.sequences.tokens();
            if (tokens > placement.device_tokens) continue;
            device_batches_ = batches_.size();
            device_tokens_ = tokens;
        }
        shards_.push_back(batches_.size());
    }
    device_ = make_state(device_tokens_, "calibration activations");
    const std::int64_t largest = limits_of(shards).tokens;
    if (!placement.keeps_carried) {
        recomputed_ = backend.empty({largest, BlockForward::carried_width(graph)}, backend.activation_dtype(),
                                    "recomputed input of a stage");
    }
    if (tokens == device_tokens_) return;
    for (State& slot : slots_) slot = make_state(largest, "calibration activations on their way");
    const auto host_tokens = static_cast<std::size_t>(tokens - device_tokens_);
    const std::size_t element = size_of(backend.activation_dtype());
    host_hidden_ = backend.host_buffer(host_tokens * static_cast<std::size_t>(hidden_width_) * element,
                                       "hidden states kept on the host");
    host_carried_ = backend.host_buffer(host_tokens * static_cast<std::size_t>(carried_width_) * element,
                                        "carried inputs kept on the host");
}

CalibrationBatches::State CalibrationBatches::make_state(std::int64_t tokens, const std::string& what) {
    const DType dtype = backend_.activation_dtype();
    return {backend_.empty({tokens, hidden_width_}, dtype, what),
            backend_.empty({tokens, carried_width_}, dtype, what)};
}

BatchState CalibrationBatches::view(std::size_t batch) {
    const MicroBatch& plan = batches_[batch].plan;
    const std::int64_t begin = on_device(batch) ? batches_[batch].first_token : 0;
    const std::int64_t end = begin + plan.sequences.tokens();
    State& state = on_device(batch) ? device_ : slots_[batch % 2];
    const TensorView carried =
        carried_width_ > 0 ? state.carried.view().rows(begin, end) : recomputed_.view().rows(0, end - begin);
    return {&plan.sequences, state.hidden.view().rows(begin, end), carried};
}

std::byte* CalibrationBatches::host_hidden(std::size_t batch) const {
    const std::int64_t token = batches_[batch].first_token - device_tokens_;
    return host_hidden_.data() +
           static_cast<std::size_t>(token * hidden_width_) * size_of(backend_.activation_dtype());
}

std::byte* CalibrationBatches::host_carried(std::size_t batch) const {
    const std::int64_t token = batches_[batch].first_token - device_tokens_;
    return host_carried_.data() +
           static_cast<std::size_t>(token * carried_width_) * size_of(backend_.activation_dtype());
}

void CalibrationBatches::upload(std::size_t batch, const StateUse& use) {
    if (batch >= batches_.size() || on_device(batch)) return;
    const BatchState state = view(batch);
    const std::int64_t tokens = state.hidden.extent(0);
    if (use.reads_hidden) lane_->upload(host_hidden(batch), state.hidden);
    if (use.reads_carried > 0) {
        lane_->upload(host_carried(batch), state.carried.leading({tokens, use.reads_carried}));
    }
    uploaded_[batch % 2] = lane_->record();
}

void CalibrationBatches::download(std::size_t batch, const StateUse& use) {
    if (on_device(batch)) return;
    const BatchState state = view(batch);
    const std::int64_t tokens = state.hidden.extent(0);
    // Also when nothing was written: the slot's next upload must not overtake the work on this batch.
    lane_->after(*backend_.record());
    if (use.writes_hidden) lane_->download(state.hidden, host_hidden(batch));
    if (use.writes_carried > 0) {
        lane_->download(state.carried.leading({tokens, use.writes_carried}), host_carried(batch));
    }
}

CalibrationBatches::Pass::Pass(CalibrationBatches& batches, StateUse use) : all_(batches), use_(use) {
    all_.upload(0, use_);
}

CalibrationBatches::Pass::~Pass() {
    try {
        if (opened_ > 0) all_.download(opened_ - 1, use_);
    } catch (const Error& error) {
        // A failed device fails the next operation too, which may throw.
        spdlog::error("{}", error.what());
    }
}

BatchState CalibrationBatches::Pass::next() {
    if (opened_ > 0) all_.download(opened_ - 1, use_);
    const std::size_t batch = opened_++;
    if (!all_.on_device(batch)) all_.backend_.after(*all_.uploaded_[batch % 2]);
    all_.upload(batch + 1, use_);
    return all_.view(batch);
}

void CalibrationBatches::embed(const std::vector<std::vector<std::int32_t>>& sequences,
                               ConstTensorView table) {
    for_each({.writes_hidden = true}, [&](const Batch& batch, const BatchState& state) {
        backend_.embed(tokens_of(batch.plan, sequences), table, state.hidden);
    });
}

std::size_t CalibrationBatches::bytes(const ModelGraph& graph, std::int64_t tokens, DType activation,
                                      bool keeps_carried) {
    const std::int64_t width = graph.hidden_size + (keeps_carried ? BlockForward::carried_width(graph) : 0);
    return static_cast<std::size_t>(tokens * width) * size_of(activation);
}

std::int64_t tokens_of_shards(std::span<const BatchShard> shards) {
    std::int64_t tokens = 0;
    for (const BatchShard& shard : shards) tokens += shard.tokens();
    return tokens;
}

BatchLimits limits_of(std::span<const BatchShard> shards) {
    BatchLimits limits;
    for (const BatchShard& shard : shards) {
        for (const MicroBatch& batch : shard.micro_batches) {
            limits.tokens = std::max(limits.tokens, batch.sequences.tokens());
            const auto& offsets = batch.sequences.offsets;
            for (std::size_t i = 1; i < offsets.size(); ++i) {
                limits.length = std::max<std::int64_t>(limits.length, offsets[i] - offsets[i - 1]);
            }
        }
    }
    return limits;
}

std::vector<std::int32_t> tokens_of(const MicroBatch& batch,
                                    const std::vector<std::vector<std::int32_t>>& sequences) {
    std::vector<std::int32_t> tokens;
    for (std::int64_t i = 0; i < batch.sequences.count(); ++i) {
        const auto& sequence = sequences[static_cast<std::size_t>(batch.first_sequence + i)];
        tokens.insert(tokens.end(), sequence.begin(), sequence.end());
    }
    return tokens;
}

}  // namespace quantmill
