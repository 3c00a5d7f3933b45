#include "workers/tensor_delivery.h"

#include <algorithm>

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
    Parcel parcel{output, {}, {}, nullptr};
    for (const std::string& tensor : tensors) {
        if (owners_[output].writer_of(tensor) == control_.rank()) parcel.tensors.push_back(tensor);
    }
    if (parcel.tensors.empty()) return;
    std::sort(parcel.tensors.begin(), parcel.tensors.end());  // the order in which deliver() packs them
    std::deque<Parcel>& queue = expected_[from];
    queue.push_back(std::move(parcel));
    if (queue.size() == 1) begin_next(from);
}

void TensorDelivery::begin_next(int from) {
    Parcel& parcel = expected_.at(from).front();
    std::size_t bytes = 0;
    for (const std::string& tensor : parcel.tensors) bytes += owners_[parcel.output].bytes_of(tensor);
    parcel.bytes.resize(bytes);
    parcel.transfer = control_.start_receive_bytes(parcel.bytes.data(), bytes, from);
}

void TensorDelivery::write(const Parcel& parcel) {
    const std::byte* next = parcel.bytes.data();
    for (const std::string& tensor : parcel.tensors) {
        const std::size_t bytes = owners_[parcel.output].bytes_of(tensor);
        outputs_[parcel.output]->write({tensor, {next, next + bytes}});
        next += bytes;
    }
}

void TensorDelivery::deliver(std::size_t output, std::vector<EncodedTensor> tensors) {
    std::sort(tensors.begin(), tensors.end(),
              [](const EncodedTensor& a, const EncodedTensor& b) { return a.name < b.name; });
    std::map<int, Parcel> parcels;  // by receiver
    for (EncodedTensor& tensor : tensors) {
        const int writer = owners_[output].writer_of(tensor.name);
        if (writer == control_.rank()) {
            outputs_[output]->write(std::move(tensor));
            continue;
        }
        Parcel& parcel = parcels[writer];
        parcel.bytes.insert(parcel.bytes.end(), tensor.bytes.begin(), tensor.bytes.end());
    }
    for (auto& [writer, parcel] : parcels) {
        bytes_sent_ += parcel.bytes.size();
        sent_.push_back(std::move(parcel));
        sent_.back().transfer =
            control_.start_send_bytes(sent_.back().bytes.data(), sent_.back().bytes.size(), writer);
    }
    poll();
}

void TensorDelivery::poll() {
    for (auto& [from, queue] : expected_) {
        while (!queue.empty() && queue.front().transfer->done()) {
            write(queue.front());
            queue.pop_front();
            if (!queue.empty()) begin_next(from);
        }
    }
    while (!sent_.empty() && sent_.front().transfer->done()) sent_.pop_front();
}

void TensorDelivery::finish() {
    for (auto& [from, queue] : expected_) {
        while (!queue.empty()) {
            queue.front().transfer->wait();
            poll();
        }
    }
    for (const Parcel& parcel : sent_) parcel.transfer->wait();
    sent_.clear();
}

}  // namespace quantmill
