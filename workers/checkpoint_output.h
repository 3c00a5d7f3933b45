#pragma once

#include "comm/control.h"
#include "jobs/report.h"
#include "pipeline/checkpoint_writer.h"
#include "pipeline/quantization_config.h"
#include "workers/prepared_job.h"
#include "workers/task_queue.h"
#include "workers/worker.h"

namespace quantmill {

// This rank's part of the output checkpoint: the shards it owns, and on rank 0 everything around them.
class CheckpointOutput {
public:
    // Bytes of host memory that may wait to be written.
    static constexpr std::size_t kMostWaiting = std::size_t{1} << 30U;

    // What all ranks write, beside what is copied from the model.
    static std::vector<std::string> file_names(const PreparedJob& job);

    CheckpointOutput(const PreparedJob& job, Control& control, Backend& backend);

    // All writing goes on beside the computation: what fails is thrown by a later call.
    // Tensors that stay as they are, in this rank's shards; refuses NaN and infinities.
    void copy_untouched();
    // The linears of a group, in this rank's shards.
    void write_group(int block, const LinearGroup& group, const QuantizedLinear& quantized,
                     const std::vector<LinearWeights>& weights);
    // Closes the shards of all ranks; then rank 0 writes configs, card and report, and the index last.
    // Collective.
    void finish(const Report& report);

private:
    void copy_tensor(const std::string& name);
    void write_bias(const std::string& name, const Tensor& bias);
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
