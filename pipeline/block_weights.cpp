#include "pipeline/block_weights.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <mutex>

#include "pipeline/files.h"

namespace quantmill {
namespace {

std::vector<std::int64_t> extents(const Shape& shape) {
    std::vector<std::int64_t> result;
    for (std::size_t axis = 0; axis < shape.rank(); ++axis) result.push_back(shape[axis]);
    return result;
}

Shape shape_of(const StoredTensor& stored) {
    if (stored.shape.size() == 1) return {stored.shape[0]};
    if (stored.shape.size() == 2) return {stored.shape[0], stored.shape[1]};
    throw BadInput("tensor '{}' has {} dimensions; the weights of a model have 1 or 2", stored.name,
                   stored.shape.size());
}

constexpr std::size_t kThreads = 8;
// A multiple of every dtype's size.
constexpr std::size_t kLoadPiece = std::size_t{16} << 20U;

TensorView as_bytes(TensorView tensor, Backend& backend) {
    return {tensor.bytes(), DType::u8, {static_cast<std::int64_t>(tensor.size_bytes())}, &backend};
}

// With several threads, since one does not keep a parallel file system busy.
template <class T, class Work>
void for_each_on_threads(std::vector<T>& items, const Work& work) {
    std::atomic<std::size_t> next = 0;
    std::vector<std::future<void>> threads;
    for (std::size_t t = 0; t < std::min(kThreads, items.size()); ++t) {
        threads.push_back(std::async(std::launch::async, [&] {
            for (std::size_t i = next++; i < items.size(); i = next++) work(items[i]);
        }));
    }
    for (std::future<void>& thread : threads) thread.get();
}

}  // namespace

DType weight_dtype(const CheckpointReader& reader, const std::string& name) {
    const StoredTensor& tensor = reader.find(name);
    const std::optional<DType> dtype = dtype_from_safetensors(tensor.dtype);
    if (!dtype || (*dtype != DType::f32 && *dtype != DType::f16 && *dtype != DType::bf16)) {
        throw BadInput("{}: tensor '{}' has dtype {}, which cannot be computed with (BF16, F16, F32)",
                       reader.file_of(name).string(), name, tensor.dtype);
    }
    return *dtype;
}

GptqScheme scheme_of_module(const GptqSchemes& schemes, const std::string& module,
                            const CheckpointReader& reader) {
    if (const auto scheme = schemes.at(module)) return *scheme;
    throw BadInput("{}: tensor '{}.qweight' is there, but a rule of quantization_config.dynamic skips it",
                   reader.file_of(module + ".qweight").string(), module);
}

std::optional<GptqSchemes> schemes_of(const CheckpointReader& reader) {
    const auto found = reader.config().find("quantization_config");
    if (found == reader.config().end() || found->is_null()) return std::nullopt;
    // Read again in the order of the file: the first rule of `dynamic` that matches counts.
    const std::filesystem::path file = reader.directory() / "config.json";
    const auto config = nlohmann::ordered_json::parse(read_text(file));
    return GptqSchemes(config.at("quantization_config"), file.string());
}

WeightLoader::WeightLoader(Backend& backend, Control& control, Communicator& communicator,
                           const CheckpointReader& reader, const ModelGraph& graph)
    : backend_(backend),
      control_(control),
      communicator_(communicator),
      reader_(reader),
      graph_(graph),
      lane_(backend.make_copy_lane()) {
    if (auto schemes = schemes_of(reader)) schemes_ = std::make_unique<GptqSchemes>(std::move(*schemes));
}

WeightLoader::~WeightLoader() { stop_reading_ahead(); }

std::vector<std::string> WeightLoader::names_of_block(int block) const {
    std::vector<std::string> names;
    for (const auto& [norm, length] : graph_.norms_of(block)) names.push_back(graph_.in_block(block, norm));
    for (const Stage& stage : graph_.stages_of(block)) {
        for (const Linear& linear : stage.group.linears) {
            names.push_back(graph_.weight_of(block, linear));
            if (linear.bias) names.push_back(graph_.in_block(block, linear.name + ".bias"));
        }
    }
    return names;
}

// Tensors are dealt to ranks in the order of their names, so that every rank knows who reads what.
int WeightLoader::owner_of(const std::string& name) const {
    const auto& tensors = reader_.tensors();
    const auto position = std::distance(tensors.begin(), tensors.find(name));
    return static_cast<int>(position % control_.size());
}

WeightLoader::Coming WeightLoader::expect(const std::string& name) {
    const StoredTensor& stored = reader_.find(name);
    return {name, backend_.host_buffer(stored.bytes(), "read-ahead of " + name),
            backend_.empty(shape_of(stored), weight_dtype(reader_, name), name)};
}

// In pieces, so that a block's few large tensors keep all threads busy.
EventPtr WeightLoader::bring(std::vector<Coming>& share) {
    struct Piece {
        Coming* coming;
        std::size_t begin, end;
    };
    std::vector<Piece> pieces;
    for (Coming& coming : share) {
        for (std::size_t begin = 0; begin < coming.host.size(); begin += kLoadPiece) {
            pieces.push_back({&coming, begin, std::min(begin + kLoadPiece, coming.host.size())});
        }
    }
    std::mutex lane;
    for_each_on_threads(pieces, [&](Piece& piece) {
        Coming& coming = *piece.coming;
        std::byte* host = coming.host.data() + piece.begin;
        const std::size_t bytes = piece.end - piece.begin;
        reader_.read(coming.name, piece.begin, host, bytes);
        require_finite(reader_.find(coming.name), piece.begin, host, bytes,
                       reader_.file_of(coming.name).string());
        const TensorView whole = as_bytes(coming.tensor, backend_);
        const std::lock_guard lock(lane);
        lane_->upload(
            host, whole.rows(static_cast<std::int64_t>(piece.begin), static_cast<std::int64_t>(piece.end)));
    });
    return lane_->record();
}

void WeightLoader::read_ahead(int begin, int end, std::size_t most) {
    stop_reading_ahead();
    std::vector<std::string> names;
    for (int block = begin; block < std::min(end, graph_.blocks); ++block) {
        for (const std::string& name : names_of_block(block)) {
            if (!reader_.contains(name) || owner_of(name) != control_.rank()) continue;
            if (reader_.find(name).bytes() > most) break;
            most -= reader_.find(name).bytes();
            names.push_back(name);
        }
    }
    ahead_ = std::async(std::launch::async, [this, names = std::move(names)] {
        std::vector<std::byte> piece(kLoadPiece);
        for (const std::string& name : names) {
            const std::size_t bytes = reader_.find(name).bytes();
            for (std::size_t at = 0; at < bytes && !stop_ahead_; at += piece.size()) {
                try {
                    reader_.read(name, at, piece.data(), std::min(piece.size(), bytes - at));
                } catch (const Error&) {
                    return;  // who needs the tensor will meet it again
                }
            }
        }
    });
}

void WeightLoader::stop_reading_ahead() {
    if (!ahead_.valid()) return;
    stop_ahead_ = true;
    ahead_.get();
    stop_ahead_ = false;
}

void WeightLoader::prefetch_block(int block) {
    if (block >= graph_.blocks) return;  // lm_head is not read ahead
    prefetched_block_ = block;
    for (const std::string& name : names_of_block(block)) {
        // A missing tensor is reported by load.
        if (reader_.contains(name) && owner_of(name) == control_.rank()) share_.push_back(expect(name));
    }
    // The memory is this rank's only once the backend has come to its allocation.
    lane_->after(*backend_.record());
    arrival_ = std::async(std::launch::async, [this] { return bring(share_); });
}

void WeightLoader::await_prefetch() {
    const EventPtr arrived = arrival_.get();
    backend_.after(*arrived);
    arrived->wait();  // the host memory is free now
    for (Coming& coming : share_) at_hand_.emplace(coming.name, std::move(coming.tensor));
    share_.clear();
    prefetched_block_ = -1;
}

// Some pieces at a time: an embedding is too large to be held twice.
void WeightLoader::read_into(const std::string& name, TensorView tensor) const {
    const StoredTensor& stored = reader_.find(name);
    const std::string file = reader_.file_of(name).string();
    const TensorView all = as_bytes(tensor, backend_);
    std::vector<std::byte> host(std::min<std::size_t>(stored.bytes(), kThreads * kLoadPiece));
    for (std::size_t begin = 0; begin < stored.bytes(); begin += host.size()) {
        const std::size_t end = std::min<std::size_t>(begin + host.size(), stored.bytes());
        std::vector<std::size_t> pieces;
        for (std::size_t piece = begin; piece < end; piece += kLoadPiece) pieces.push_back(piece);
        for_each_on_threads(pieces, [&](std::size_t piece) {
            std::byte* data = host.data() + (piece - begin);
            const std::size_t bytes = std::min(kLoadPiece, end - piece);
            reader_.read(name, piece, data, bytes);
            require_finite(stored, piece, data, bytes, file);
        });
        backend_.copy_from_host(host.data(),
                                all.rows(static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end)));
    }
}

Tensor WeightLoader::load(const std::string& name, const Shape& shape) {
    reader_.find(name, extents(shape));
    const int owner = owner_of(name);
    Tensor tensor;
    if (auto found = at_hand_.extract(name); !found.empty()) {
        tensor = std::move(found.mapped());
    } else {
        tensor = backend_.empty(shape, weight_dtype(reader_, name), name);
        if (control_.rank() == owner) read_into(name, tensor);
    }
    communicator_.broadcast(tensor, owner);
    return tensor;
}

Tensor WeightLoader::load_as(const std::string& name, const Shape& shape, DType dtype) {
    const Tensor stored = load(name, shape);
    Tensor converted = backend_.empty(shape, dtype, name);
    backend_.convert(stored, converted);
    return converted;
}

Tensor WeightLoader::to_forward(const Tensor& stored) {
    Tensor converted = backend_.empty(stored.shape(), backend_.activation_dtype(), "weights of a linear");
    backend_.convert(stored, converted);
    return converted;
}

LinearWeights WeightLoader::load_linear(int block, const Linear& linear) {
    LinearWeights weights;
    const std::string prefix = graph_.in_block(block, linear.name);
    if (schemes_ == nullptr || !reader_.contains(prefix + ".qweight")) {
        weights.stored = load(graph_.weight_of(block, linear), {linear.rows, linear.columns});
    }
    if (linear.bias) weights.bias = load_as(prefix + ".bias", {linear.rows}, DType::f32);
    return weights;
}

BlockWeights WeightLoader::load_block(int block) {
    if (prefetched_block_ == block) await_prefetch();
    BlockWeights weights;
    for (const auto& [norm, length] : graph_.norms_of(block)) {
        weights.norms.emplace(norm, load_as(graph_.in_block(block, norm), {length}, DType::f32));
    }
    for (const Stage& stage : graph_.stages_of(block)) {
        std::vector<LinearWeights>& group = weights.stages.emplace_back();
        for (const Linear& linear : stage.group.linears) group.push_back(load_linear(block, linear));
    }
    return weights;
}

Tensor WeightLoader::decode_linear(int block, const Linear& linear) {
    const std::string prefix = graph_.in_block(block, linear.name);
    const GptqScheme scheme = scheme_of_module(*schemes_, prefix, reader_);
    QuantizationGrid grid = scheme.grid;
    if (grid.group_size == 0) grid.group_size = linear.columns;
    for (const StoredTensor& expected : gptq_tensors(prefix, linear.rows, linear.columns, grid)) {
        const StoredTensor& stored = reader_.find(expected.name, expected.shape);
        if (stored.dtype == expected.dtype) continue;
        throw BadInput("{}: tensor '{}' has dtype {}, expected {}", reader_.file_of(stored.name).string(),
                       stored.name, stored.dtype, expected.dtype);
    }
    const auto read = [this](const std::string& name) {
        const StoredTensor& stored = reader_.find(name);
        std::vector<std::byte> bytes(stored.bytes());
        reader_.read(name, bytes.data());
        require_finite(stored, bytes.data(), reader_.file_of(name).string());
        return bytes;
    };
    const QuantizedLinear quantized =
        decode_gptq(backend_, prefix, linear.rows, linear.columns, scheme, read);
    Tensor forward = backend_.empty({linear.rows, linear.columns}, backend_.activation_dtype(), prefix);
    backend_.dequantize(quantized.rows(0, linear.rows), quantized.g_idx, forward);
    return forward;
}

BlockWeights WeightLoader::load_block_for_forward(int block) {
    BlockWeights weights = load_block(block);
    const std::vector<Stage>& stages = graph_.stages_of(block);
    for (std::size_t s = 0; s < stages.size(); ++s) {
        const LinearGroup& group = stages[s].group;
        for (std::size_t l = 0; l < group.linears.size(); ++l) {
            LinearWeights& linear = weights.stages[s][l];
            linear.forward =
                linear.stored.empty() ? decode_linear(block, group.linears[l]) : to_forward(linear.stored);
            linear.stored = {};
        }
    }
    return weights;
}

}  // namespace quantmill
