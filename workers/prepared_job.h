#pragma once

#include <vector>

#include "comm/control.h"
#include "jobs/job_spec.h"
#include "pipeline/batch_plan.h"
#include "pipeline/calibration_store.h"
#include "pipeline/checkpoint_reader.h"
#include "pipeline/model_graph.h"
#include "pipeline/output_layout.h"

namespace quantmill {

// A job with everything opened and checked that can be without reading more than biases. Equal on all ranks.
struct PreparedJob {
    JobSpec spec;
    CheckpointReader reader;
    ModelGraph graph;
    CalibrationStore calibration;
    std::vector<BatchShard> shards;
    QuantizationScheme scheme;
    OutputLayout layout;
    bool head = false;      // this checkpoint, or another one of the job, quantizes lm_head
    bool measures = false;  // what its linears do to their blocks is all that is wanted; nothing is written
};

// Throws BadInput for whatever is wrong with the model directory, the calibration store or their fit.
// micro_batch_tokens: the backend's.
PreparedJob prepare_job(const JobSpec& spec, std::int64_t micro_batch_tokens);

// What the job's keys say without quantization.target_bits, which replaces the bits of the usual linears.
QuantizationScheme scheme_before_target(const PreparedJob& job);

// One for each checkpoint that the job writes; they differ in `spec`, `scheme` and `layout` only.
std::vector<PreparedJob> prepare_jobs(const JobSpec& spec, std::int64_t micro_batch_tokens);

// Lets rank 0 find what is wrong with the input, so that it is said once; the others follow when it is fine.
template <class Prepare>
auto rank_zero_first(Control& control, const Prepare& prepare) {
    if (control.rank() != 0) control.barrier();
    auto prepared = prepare();
    if (control.rank() == 0) control.barrier();
    return prepared;
}

// Lengths of sequences, in order.
std::vector<std::int64_t> lengths_of(const std::vector<std::vector<std::int32_t>>& sequences);

}  // namespace quantmill
