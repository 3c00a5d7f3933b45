#include "workers/hidden_stream.h"

#include <algorithm>

namespace quantmill {
namespace {

// One that is received, one that is computed, one that is sent.
constexpr std::size_t kSlots = 3;

}  // namespace

std::vector<StreamItem> stream_items(std::span<const BatchShard> shards, int index, std::size_t group_size) {
    std::vector<StreamItem> items;
    std::int64_t token = 0;
    for (std::size_t shard = 0; shard < shards.size(); ++shard) {
        if (shard_owner(shard, group_size) != index) continue;
        for (const MicroBatch& batch : shards[shard].micro_batches) {
            items.push_back({shard, &batch, token, false});
            token += batch.sequences.tokens();
        }
        items.back().closes_shard = true;
    }
    return items;
}

HiddenStream::HiddenStream(Backend& backend, std::int64_t hidden_size, const LayerPlan& plan, int rank,
                           const LayerLinks& links, std::span<const BatchShard> shards)
    : backend_(backend), links_(links), sweeps_(plan.sweeps.size()) {
    const int group = plan.group_of(rank);
    first_ = group == 0;
    last_ = group == static_cast<int>(plan.groups.size()) - 1;
    items_ = stream_items(shards, plan.index_of(rank), plan.groups[static_cast<std::size_t>(group)].size());
    incoming_.resize(items_.size());
    outgoing_.resize(items_.size());
    std::int64_t tokens = 0, largest = 0;
    for (const StreamItem& item : items_) {
        tokens += item.batch->sequences.tokens();
        largest = std::max(largest, item.batch->sequences.tokens());
    }
    const DType activation = backend.activation_dtype();
    if (first_ && sweeps_ > 1) {
        kept_ = backend.empty({tokens, hidden_size}, activation, "hidden states");
        return;
    }
    for (std::size_t i = 0; i < kSlots; ++i) {
        ring_.push_back(backend.empty({largest, hidden_size}, activation, "hidden states on their way"));
    }
}

std::size_t HiddenStream::bytes(std::int64_t hidden_size, std::int64_t tokens, std::int64_t batch_tokens,
                                bool kept, DType activation) {
    const std::int64_t rows = kept ? tokens : batch_tokens * static_cast<std::int64_t>(kSlots);
    return static_cast<std::size_t>(rows * hidden_size) * size_of(activation);
}

TensorView HiddenStream::slot(std::size_t item) {
    const std::int64_t tokens = items_[item].batch->sequences.tokens();
    if (ring_.empty()) return kept_.view().rows(items_[item].first_token, items_[item].first_token + tokens);
    Tensor& buffer = ring_[item % kSlots];
    return buffer.view().leading({tokens, buffer.shape()[1]});
}

void HiddenStream::receive(std::size_t item, const Link& link) {
    incoming_[item] = link.communicator->start_receive(slot(item), link.peers[items_[item].shard]);
}

void HiddenStream::begin(std::size_t sweep) {
    sweep_ = sweep;
    if (!first_ && !items_.empty()) receive(0, links_.previous());
}

// A micro-batch ahead, so that it travels beside the computation; where waiting for it would slow that down,
// no sooner than it is needed.
TensorView HiddenStream::take(std::size_t item) {
    if (item >= 2) settle(item - 2);
    if (!first_) {
        const std::size_t next = links_.previous().communicator->receives_occupy_device() ? item : item + 1;
        if (next > 0 && next < items_.size()) receive(next, links_.previous());
    }
    if (incoming_[item] != nullptr) incoming_[item]->wait();
    incoming_[item].reset();
    return slot(item);
}

void HiddenStream::pass(std::size_t item) {
    const bool around = last_ && sweep_ + 1 < sweeps_;
    const Link& link = around ? links_.around() : links_.next();
    if (link.communicator == nullptr) return;
    outgoing_[item] = link.communicator->start_send(slot(item), link.peers[items_[item].shard]);
}

void HiddenStream::settle(std::size_t item) {
    if (outgoing_[item] != nullptr) outgoing_[item]->wait();
    outgoing_[item].reset();
    const bool comes_back = first_ && !last_ && sweep_ + 1 < sweeps_;
    if (comes_back) receive(item, links_.around());
}

void HiddenStream::end() {
    for (std::size_t item = items_.size() - std::min<std::size_t>(items_.size(), 2); item < items_.size();
         ++item) {
        settle(item);
    }
}

}  // namespace quantmill
