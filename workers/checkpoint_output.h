#pragma once

#include "comm/control.h"
#include "jobs/report.h"
#include "pipeline/checkpoint_writer.h"
#include "pipeline/quantization_config.h"
#include "workers/prepared_job.h"
#include "workers/task_queue.h"
#include "workers/worker.h"

namespace quantmill {

// A tensor as its file holds it.
struct EncodedTensor {
    std::string name;
    std::vector<std::byte> bytes;
};

// This rank's part of the output checkpoint: the shards it owns, and on rank 0 everything around them.
class CheckpointOutput {
public:
    // Bytes of host memory that may wait to be written.
    static constexpr std::size_t kMostWaiting = std::size_t{1} << 30U;

    // What all ranks write, beside what is copied from the model.
    static std::vector<std::string> file_names(const PreparedJob& job);

    CheckpointOutput(const PreparedJob& job, Control& control, Backend& backend);
    // `owned`: indices of the output shards that this rank writes.
    CheckpointOutput(const PreparedJob& job, Control& control, Backend& backend,
                     const std::vector<std::size_t>& owned);

    // All writing goes on beside the computation: what fails is thrown by a later call.
    // Tensors that stay as they are, in this rank's shards; refuses NaN and infinities.
    void copy_untouched();
    // The linears of a group, in this rank's shards.
    void write_group(int block, const LinearGroup& group, const QuantizedLinear& quantized,
                     const std::vector<LinearWeights>& weights);
    // All tensors of a group, whoever writes them; and one of them in this rank's shards.
    std::vector<EncodedTensor> encode_group(int block, const LinearGroup& group,
                                            const QuantizedLinear& quantized,
                                            const std::vector<LinearWeights>& weights) const;
    void write(EncodedTensor tensor);
    // Closes the shards of all ranks; then rank 0 writes configs, card and report, and the index last.
    // Collective.
    void finish(const Report& report);

private:
    void copy_tensor(const std::string& name);
    EncodedTensor encode_bias(const std::string& name, const Tensor& bias) const;
    void write_documents(const Report& report) const;

    const PreparedJob& job_;
    Control& control_;
    Backend& backend_;
    GptqFormat format_;
    CheckpointWriter writer_;
    std::unique_ptr<CopyLane> lane_;
    TaskQueue writes_;  // goes first: its tasks use the writer
};

}  // namespace quantmill
