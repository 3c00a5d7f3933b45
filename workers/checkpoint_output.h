#pragma once

#include "comm/control.h"
#include "jobs/report.h"
#include "pipeline/checkpoint_writer.h"
#include "pipeline/quantization_config.h"
#include "workers/prepared_job.h"
#include "workers/worker.h"

namespace quantmill {

// This rank's part of the output checkpoint: the shards it owns, and on rank 0 everything around them.
class CheckpointOutput {
public:
    CheckpointOutput(const PreparedJob& job, Control& control, Backend& backend);

    // Tensors that stay as they are, in this rank's shards; refuses NaN and infinities.
    void copy_untouched();
    // The linears of a group, in this rank's shards.
    void write_group(int block, const LinearGroup& group, const QuantizedLinear& quantized,
                     const std::vector<LinearWeights>& weights);
    // Closes the shards of all ranks; then rank 0 writes configs, card and report, and the index last.
    // Collective.
    void finish(const Report& report);

private:
    void write_bias(const std::string& name, const Tensor& bias);
    void write_documents(const Report& report) const;

    const PreparedJob& job_;
    Control& control_;
    Backend& backend_;
    GptqFormat format_;
    CheckpointWriter writer_;
};

}  // namespace quantmill
