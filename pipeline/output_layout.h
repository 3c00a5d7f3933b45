#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pipeline/checkpoint_reader.h"
#include "pipeline/checkpoint_writer.h"
#include "pipeline/gptq_format.h"
#include "pipeline/model_graph.h"
#include "pipeline/quantization_scheme.h"

namespace quantmill {

// What goes into the output checkpoint and where, known before the first FLOP.
struct OutputLayout {
    std::vector<OutputShard> shards;
    std::vector<std::string> copied;  // tensors that are carried over untouched, in the order of the files
    std::uint64_t total_bytes() const;
};

// The tensors of the source with each quantized linear's weight replaced by its GPTQ tensors (and its bias in
// fp16); a tied lm_head is omitted, unless it is quantized. Order: embedding, blocks, final norm, lm_head,
// everything else.
OutputLayout plan_output(const CheckpointReader& reader, const ModelGraph& graph,
                         const QuantizationScheme& scheme, std::uint64_t max_shard_size);

// The grid of a linear with this many columns: group_size -1 means one group a row.
QuantizationGrid grid_for(const QuantizationGrid& grid, std::int64_t columns);

}  // namespace quantmill
