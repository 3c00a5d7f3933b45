#pragma once

#include <memory>
#include <span>
#include <vector>

#include "pipeline/batch_plan.h"
#include "workers/layer_links.h"

namespace quantmill {

// One micro-batch in the order in which a rank computes them: by shard, then as in the shard. All groups keep
// this order, so that what a rank waits for never waits for what that rank has yet to do.
struct StreamItem {
    std::size_t shard = 0;
    const MicroBatch* batch = nullptr;
    std::int64_t first_token = 0;  // among those of this rank
    bool closes_shard = false;
};
std::vector<StreamItem> stream_items(std::span<const BatchShard> shards, int index, std::size_t group_size);

// The hidden states of this rank's micro-batches as they come from the group before and go to the group
// after: while one is computed, the next is received and the last one sent. The first group keeps them all
// when there is more than one sweep.
class HiddenStream {
public:
    // `shards`: of the job.
    HiddenStream(Backend& backend, std::int64_t hidden_size, const LayerPlan& plan, int rank,
                 const LayerLinks& links, std::span<const BatchShard> shards);

    const std::vector<StreamItem>& items() const { return items_; }
    void begin(std::size_t sweep);
    // Whether hidden states do not come from anywhere yet: the caller embeds tokens into what take() returns.
    bool embeds() const { return first_ && sweep_ == 0; }
    TensorView take(std::size_t item);  // [T, hidden_size]
    void pass(std::size_t item);
    void end();

    // Bytes that a rank with these tokens holds; `kept`: the first group's, with several sweeps.
    static std::size_t bytes(std::int64_t hidden_size, std::int64_t tokens, std::int64_t batch_tokens,
                             bool kept, DType activation);

private:
    TensorView slot(std::size_t item);
    void receive(std::size_t item, const Link& link);
    // Waits until the slot of an item that was passed on is free; it may come back there.
    void settle(std::size_t item);

    Backend& backend_;
    const LayerLinks& links_;
    std::size_t sweeps_;
    std::size_t sweep_ = 0;
    bool first_, last_;  // group
    std::vector<StreamItem> items_;
    Tensor kept_;               // [tokens, hidden_size]
    std::vector<Tensor> ring_;  // [largest micro-batch, hidden_size]
    // [item]; the last members, since what they move must outlive them
    std::vector<std::unique_ptr<Transfer>> incoming_, outgoing_;
};

}  // namespace quantmill
