#include "workers/tensor_delivery.h"

#include <algorithm>
#include <cstring>
#include <set>

namespace quantmill {

TensorOwners::TensorOwners(const OutputLayout& layout, const std::vector<int>& writers) {
    for (std::size_t i = 0; i < layout.shards.size(); ++i) {
        for (const StoredTensor& tensor : layout.shards[i].tensors) {
            places_[tensor.name] = {writers[i], static_cast<std::size_t>(tensor.bytes())};
        }
    }
}

TensorDelivery::TensorDelivery(Control& control, std::vector<CheckpointOutput*> outputs,
                               std::vector<TensorOwners> owners)
    : control_(control), outputs_(std::move(outputs)), owners_(std::move(owners)) {}

void TensorDelivery::expect(int from, std::size_t output, const std::vector<std::string>& tensors) {
    if (from == control_.rank()) return;
    Parcel parcel{output, {}, nullptr, nullptr};
    for (const std::string& tensor : tensors) {
        if (owners_[output].writer_of(tensor) == control_.rank()) parcel.tensors.push_back(tensor);
    }
    if (parcel.tensors.empty()) return;
    std::sort(parcel.tensors.begin(), parcel.tensors.end());  // the order in which deliver() packs them
    std::deque<Parcel>& queue = expected_[from];
    queue.push_back(std::move(parcel));
    if (queue.size() == 1) begin_next(from);
}

void TensorDelivery::Bytes::allocate(std::size_t bytes) {
    data = std::make_unique_for_overwrite<std::byte[]>(bytes);
    size = bytes;
}

void TensorDelivery::begin_next(int from) {
    Parcel& parcel = expected_.at(from).front();
    std::size_t bytes = 0;
    for (const std::string& tensor : parcel.tensors) bytes += owners_[parcel.output].bytes_of(tensor);
    parcel.bytes = std::make_shared<Bytes>();
    parcel.bytes->allocate(bytes);
    parcel.transfer = control_.start_receive_bytes(parcel.bytes->data.get(), bytes, from);
}

void TensorDelivery::write(const Parcel& parcel) {
    const std::byte* next = parcel.bytes->data.get();
    for (const std::string& tensor : parcel.tensors) {
        const std::size_t bytes = owners_[parcel.output].bytes_of(tensor);
        outputs_[parcel.output]->write(tensor, {next, bytes}, parcel.bytes);
        next += bytes;
    }
}

EncodedLinear::Sink TensorDelivery::deliver(std::size_t output, const std::vector<std::string>& tensors) {
    std::map<int, std::shared_ptr<Outgoing>> parcels;  // by receiver
    std::map<std::string, std::shared_ptr<Outgoing>> parcel_of;
    for (const std::string& tensor : std::set<std::string>(tensors.begin(), tensors.end())) {
        const int writer = owners_[output].writer_of(tensor);
        if (writer == control_.rank()) continue;
        auto& parcel = parcels[writer];
        if (parcel == nullptr) parcel = std::make_shared<Outgoing>();
        parcel->to = writer;
        parcel->offsets[tensor] = parcel->bytes.size;
        parcel->bytes.size += owners_[output].bytes_of(tensor);
        ++parcel->missing;
        parcel_of[tensor] = parcel;
    }
    for (const auto& [writer, parcel] : parcels) {
        parcel->bytes.allocate(parcel->bytes.size);
        bytes_sent_ += parcel->bytes.size;
        sent_.push_back(parcel);
    }
    poll();
    if (parcels.empty()) return {};
    return [parcel_of](const std::string& name, const void* data, std::size_t bytes) {
        Outgoing& parcel = *parcel_of.at(name);
        std::memcpy(parcel.bytes.data.get() + parcel.offsets.at(name), data, bytes);
        --parcel.missing;
    };
}

// What goes to one rank leaves in the order of the deliveries.
void TensorDelivery::send() {
    for (const auto& parcel : sent_) {
        if (parcel->transfer != nullptr) continue;
        if (parcel->missing != 0) break;
        parcel->transfer =
            control_.start_send_bytes(parcel->bytes.data.get(), parcel->bytes.size, parcel->to);
    }
    while (!sent_.empty() && sent_.front()->transfer != nullptr && sent_.front()->transfer->done()) {
        sent_.pop_front();
    }
}

void TensorDelivery::poll() {
    send();
    for (auto& [from, queue] : expected_) {
        while (!queue.empty() && queue.front().transfer->done()) {
            write(queue.front());
            queue.pop_front();
            if (!queue.empty()) begin_next(from);
        }
    }
}

void TensorDelivery::finish() {
    // Nobody may wait for others before all that others wait for is on its way.
    for (CheckpointOutput* output : outputs_) output->settle();
    poll();
    for (auto& [from, queue] : expected_) {
        while (!queue.empty()) {
            queue.front().transfer->wait();
            poll();
        }
    }
    for (const auto& parcel : sent_) parcel->transfer->wait();
    sent_.clear();
    for (CheckpointOutput* output : outputs_) output->settle();
}

}  // namespace quantmill
