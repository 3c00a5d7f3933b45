#pragma once

#include <atomic>
#include <cstddef>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "pipeline/checkpoint_reader.h"
#include "pipeline/gptq_format.h"
#include "pipeline/model_graph.h"

namespace quantmill {

struct LinearWeights {
    Tensor stored;    // [R, C] in the checkpoint's dtype; empty when the checkpoint is quantized
    Tensor bias;      // f32 [R] or empty
    Tensor forward;   // [R, C] activation dtype, what the forward pass multiplies with; may be empty
    Tensor original;  // the same, of the original path, while a stage's turn lasts (BatchState::original)
};

struct BlockWeights {
    std::map<std::string, Tensor> norms;             // f32, by name in the block
    std::vector<std::vector<LinearWeights>> stages;  // [stage][linear of its group]
};

// The dtype of a tensor that is computed with; throws BadInput when that is none of F32, F16, BF16.
DType weight_dtype(const CheckpointReader& reader, const std::string& name);

// What the quantization_config of a GPTQ checkpoint says; nothing for a plain one. Throws BadInput for other
// methods.
std::optional<GptqSchemes> schemes_of(const CheckpointReader& reader);
// That of a module whose qweight is there. Throws BadInput when a rule says that it is not quantized.
GptqScheme scheme_of_module(const GptqSchemes& schemes, const std::string& module,
                            const CheckpointReader& reader);

// Brings a checkpoint's weights to the backends of all ranks. Each rank reads its share of the tensors from
// disk once, checks it for NaN, and the communicator spreads it. Collective: all ranks call alike.
class WeightLoader {
public:
    WeightLoader(Backend& backend, Control& control, Communicator& communicator,
                 const CheckpointReader& reader, const ModelGraph& graph);
    ~WeightLoader();
    WeightLoader(const WeightLoader&) = delete;
    WeightLoader& operator=(const WeightLoader&) = delete;

    // Block number graph.blocks is the final norm and lm_head.
    // Starts reading this rank's share of a block and bringing it to the backend, beside whatever the backend
    // computes; load_block uses it when it is there.
    void prefetch_block(int block);
    // Reads this rank's share of blocks [begin, end), of `most` bytes at most, in the background and forgets
    // it: the host's file cache then has it when those blocks are loaded.
    void read_ahead(int begin, int end, std::size_t most);
    // Weights as stored, without `forward`.
    BlockWeights load_block(int block);
    // Weights ready for the forward pass, dequantized when the checkpoint is a GPTQ one.
    BlockWeights load_block_for_forward(int block);
    // A tensor of the checkpoint, e.g. the embedding, in its stored dtype.
    Tensor load(const std::string& name, const Shape& shape);
    Tensor load_as(const std::string& name, const Shape& shape, DType dtype);
    Tensor to_forward(const Tensor& stored);  // converted to the activation dtype

private:
    // A tensor on its way from disk to the backend.
    struct Coming {
        std::string name;
        HostBuffer host;
        Tensor tensor;
    };
    std::vector<std::string> names_of_block(int block) const;
    int owner_of(const std::string& name) const;  // the rank that reads a tensor
    Coming expect(const std::string& name);
    void read_into(const std::string& name, TensorView tensor) const;
    EventPtr bring(std::vector<Coming>& share);  // reads, checks for NaN, uploads
    void await_prefetch();
    void stop_reading_ahead();
    LinearWeights load_linear(int block, const Linear& linear);
    Tensor decode_linear(int block, const Linear& linear);

    Backend& backend_;
    Control& control_;
    Communicator& communicator_;
    const CheckpointReader& reader_;
    const ModelGraph& graph_;
    std::unique_ptr<GptqSchemes> schemes_;  // of a quantized checkpoint
    int prefetched_block_ = -1;
    std::vector<Coming> share_;  // of the block that is being prefetched
    std::map<std::string, Tensor> at_hand_;
    std::unique_ptr<CopyLane> lane_;  // used by the prefetch only; goes before the buffers that it reads
    std::future<EventPtr> arrival_;   // goes first: its thread fills the share
    std::atomic<bool> stop_ahead_{false};
    std::future<void> ahead_;
};

}  // namespace quantmill
