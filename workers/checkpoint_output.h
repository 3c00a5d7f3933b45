#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/control.h"
#include "jobs/report.h"
#include "pipeline/checkpoint_writer.h"
#include "pipeline/gptq_format.h"
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
    // `owned`: indices of the output shards that this rank writes.
    CheckpointOutput(const PreparedJob& job, Control& control, Backend& backend,
                     const std::vector<std::size_t>& owned);

    // Takes the host memory that waiting results will need, beside whatever comes next: where many results
    // come at once, they would wait for it.
    void pin_ahead();
    // All writing goes on beside the computation: what fails is thrown by a later call.
    // Tensors that stay as they are, in this rank's shards; refuses NaN and infinities.
    void copy_untouched();
    // The linears of a group, in this rank's shards. `elsewhere` takes the tensors of other ranks' shards, on
    // the writing thread; none: nobody wants them.
    void write_group(int block, const LinearGroup& group, const QuantizedLinear& quantized,
                     const std::vector<LinearWeights>& weights, const EncodedLinear::Sink& elsewhere = {});
    // A tensor in this rank's shards, as its file holds it; `bytes` lie in memory that `owner` keeps.
    void write(const std::string& name, std::span<const std::byte> bytes, std::shared_ptr<const void> owner);
    // Waits for all writing that was asked for.
    void settle() { writes_.finish(); }
    // Closes the shards of all ranks; then rank 0 writes configs, card and report, and the index last.
    // Collective.
    void finish(const Report& report);

private:
    void copy_tensor(const std::string& name);
    std::vector<std::byte> encode_bias(const std::string& name, const Tensor& bias) const;
    void place(const std::string& name, std::span<const std::byte> bytes,
               const EncodedLinear::Sink& elsewhere);
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
