#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "pipeline/batch_plan.h"
#include "pipeline/forward.h"

namespace quantmill {

// What a pass over the batches reads and writes of the state that is kept between stages.
struct StateUse {
    bool reads_hidden = false, writes_hidden = false;
    std::int64_t reads_carried = 0, writes_carried = 0;  // columns of the carried input
};

// What a rank keeps of its calibration tokens between stages: nothing of it changes a byte of the result.
struct ActivationPlacement {
    static constexpr std::int64_t kAllTokens = std::numeric_limits<std::int64_t>::max();
    std::int64_t device_tokens = kAllTokens;  // whose activations stay on the device
    // Keep the inputs that stages carry to the next one; else each pass recomputes them from the residual
    // stream.
    bool keeps_carried = true;
};

// Where a pass that needs the input of a stage begins: there, or where the residual stream was last changed.
std::size_t first_of_pass(const ModelGraph& graph, std::size_t stage, bool keeps_carried);
// The use of a pass that looks at the inputs of a stage, and of one that runs stages [first, last).
StateUse use_of_input(const ModelGraph& graph, std::size_t stage);
StateUse use_of_stages(const ModelGraph& graph, std::size_t first, std::size_t last);
// Whether a pass that ends before stage `last` keeps what it computed, or leaves it to the next one.
bool keeps_result(const ModelGraph& graph, std::size_t last, bool keeps_carried);
// The use of a pass on the original path, which looks at the inputs of stages [first, last) and runs them.
StateUse use_of_original(const ModelGraph& graph, std::size_t first, std::size_t last, bool keeps_carried);

// The micro-batches that one rank owns and what it keeps of them between stages: the residual stream and, if
// placed so, the input carried to the next stage. The first batches live in device memory, the others in
// pinned host memory, from where a pass streams them through two slots while it computes.
class CalibrationBatches {
public:
    struct Batch {
        MicroBatch plan;
        std::int64_t first_token = 0;  // of this rank's tokens
    };
    // `shards`: those of this rank. Batches whose tokens all lie below device_tokens stay on the device.
    CalibrationBatches(Backend& backend, const ModelGraph& graph, std::span<const BatchShard> shards,
                       const ActivationPlacement& placement = {});

    std::size_t shards() const { return shards_.size() - 1; }
    // Batches of all shards, in order; those of shard s are [first_of(s), first_of(s + 1)).
    const std::vector<Batch>& batches() const { return batches_; }
    std::size_t first_of(std::size_t shard) const { return shards_[shard]; }

    // One walk over all batches in order; the next batch is uploaded while the current one is computed.
    class Pass {
    public:
        Pass(CalibrationBatches& batches, StateUse use);
        ~Pass();
        Pass(const Pass&) = delete;
        Pass& operator=(const Pass&) = delete;
        // Ends the work on the batch before and returns the next one's state.
        BatchState next();

    private:
        CalibrationBatches& all_;
        StateUse use_;
        std::size_t opened_ = 0;
    };

    // Calls visit(batch, state) for all batches in order.
    template <class Visit>
    void for_each(StateUse use, const Visit& visit) {
        Pass pass(*this, use);
        for (const Batch& batch : batches_) visit(batch, pass.next());
    }
    // hidden = embedding of the batches' tokens; table [V, C] as stored.
    void embed(const std::vector<std::vector<std::int32_t>>& sequences, ConstTensorView table);

    // Bytes that `tokens` tokens take, wherever they live.
    static std::size_t bytes(const ModelGraph& graph, std::int64_t tokens, DType activation,
                             bool keeps_carried);

private:
    struct State {
        Tensor hidden;   // [tokens, hidden_size]
        Tensor carried;  // [tokens, carried_width]
    };
    State make_state(std::int64_t tokens, const std::string& what);
    bool on_device(std::size_t batch) const { return batch < device_batches_; }
    BatchState view(std::size_t batch);
    std::byte* host_hidden(std::size_t batch) const;
    std::byte* host_carried(std::size_t batch) const;
    void upload(std::size_t batch, const StateUse& use);
    void download(std::size_t batch, const StateUse& use);

    Backend& backend_;
    std::int64_t hidden_width_;
    std::int64_t carried_width_;  // 0: not kept
    std::vector<Batch> batches_;
    std::vector<std::size_t> shards_{0};  // first batch of each, then their number
    std::size_t device_batches_ = 0;
    std::int64_t device_tokens_ = 0;  // in them
    State device_;
    std::array<State, 2> slots_;
    Tensor recomputed_;  // [largest micro-batch, carried width]: of the current batch, when it is not kept
    std::array<EventPtr, 2> uploaded_;
    HostBuffer host_hidden_, host_carried_;
    std::unique_ptr<CopyLane> lane_;  // goes first: its copies use the buffers
};

// The largest micro-batch and the longest sequence of a job: what scratch buffers are sized for.
struct BatchLimits {
    std::int64_t tokens = 0;
    std::int64_t length = 0;
};
BatchLimits limits_of(std::span<const BatchShard> shards);
std::int64_t tokens_of_shards(std::span<const BatchShard> shards);

// The tokens of a micro-batch, one sequence after the other.
std::vector<std::int32_t> tokens_of(const MicroBatch& batch,
                                    const std::vector<std::vector<std::int32_t>>& sequences);

}  // namespace quantmill
