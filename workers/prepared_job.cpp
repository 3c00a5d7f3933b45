#include "workers/prepared_job.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/half.h"
#include "pipeline/block_weights.h"
#include "workers/bit_choice.h"
#include "workers/job_scheme.h"

namespace quantmill {
namespace {

void require_unquantized(const CheckpointReader& reader) {
    const auto config = reader.config().find("quantization_config");
    if (config == reader.config().end() || config->is_null()) return;
    throw BadInput(
        "{}: the model is quantized already (quantization_config in config.json): give the original",
        reader.directory().string());
}

// Every tensor that the forward pass will need, with its shape and a dtype that can be computed with: found
// wrong now rather than hours later.
void require_tensors(const CheckpointReader& reader, const ModelGraph& graph) {
    const auto require = [&reader](const std::string& name, const std::vector<std::int64_t>& shape) {
        reader.find(name, shape);
        weight_dtype(reader, name);
    };
    require(graph.embedding, {graph.vocab_size, graph.hidden_size});
    require(graph.lm_head, {graph.vocab_size, graph.hidden_size});
    require(graph.final_norm, {graph.hidden_size});
    for (int block = 0; block < graph.blocks; ++block) {
        for (const auto& [norm, length] : graph.norms()) require(graph.in_block(block, norm), {length});
        for (const Stage& stage : graph.stages) {
            for (const Linear& linear : stage.group.linears) {
                const std::string name = graph.in_block(block, linear.name);
                require(name + ".weight", {linear.rows, linear.columns});
                if (linear.bias) {
                    require(name + ".bias", {linear.rows});
                } else if (reader.contains(name + ".bias")) {
                    throw BadInput(
                        "{}: tensor '{}.bias' is there, but config.json says that this linear has no bias",
                        reader.directory().string(), name);
                }
            }
        }
    }
}

// Whether the model is one of bfloat16, by its first linear: consumers then compute in that type.
bool is_bf16(const CheckpointReader& reader, const ModelGraph& graph) {
    const std::string& first = graph.stages.front().group.linears.front().name;
    return weight_dtype(reader, graph.in_block(0, first) + ".weight") == DType::bf16;
}

// With a target what can be said of it before it is measured.
QuantizationScheme planned_scheme(const JobSpec& spec, const CheckpointReader& reader,
                                  const ModelGraph& graph) {
    QuantizationScheme scheme = scheme_of_job(spec, graph, is_bf16(reader, graph));
    if (!spec.quantization.target_bits) return scheme;
    return BitChoiceMaker(spec, graph, scheme).provisional();
}

// Biases are written as float16 whatever the source holds; beyond its range that would be an infinity.
void require_bias_fits_half(const CheckpointReader& reader, const std::string& name) {
    const StoredTensor& tensor = reader.find(name);
    const std::string file = reader.file_of(name).string();
    std::vector<std::byte> bytes(tensor.bytes());
    reader.read(name, bytes.data());
    require_finite(tensor, bytes.data(), file);
    if (weight_dtype(reader, name) == DType::f16) return;
    const bool single = weight_dtype(reader, name) == DType::f32;
    for (std::size_t i = 0; i < static_cast<std::size_t>(tensor.count()); ++i) {
        float value = 0.0F;
        if (single) {
            std::memcpy(&value, bytes.data() + i * sizeof(value), sizeof(value));
        } else {
            BFloat16 stored{};
            std::memcpy(&stored, bytes.data() + i * sizeof(stored), sizeof(stored));
            value = to_float(stored);
        }
        if (std::isfinite(to_float(to_half(value)))) continue;
        throw BadInput(
            "{}: tensor '{}' holds {} at index {}: the formats store biases as float16, which ends at {}",
            file, name, value, i, kHalfMax);
    }
}

void require_biases_fit(const CheckpointReader& reader, const ModelGraph& graph) {
    for (int block = 0; block < graph.blocks; ++block) {
        for (const Stage& stage : graph.stages) {
            for (const Linear& linear : stage.group.linears) {
                if (linear.bias) require_bias_fits_half(reader, graph.in_block(block, linear.name) + ".bias");
            }
        }
    }
}

}  // namespace

std::vector<std::int64_t> lengths_of(const std::vector<std::vector<std::int32_t>>& sequences) {
    std::vector<std::int64_t> lengths;
    for (const auto& sequence : sequences) lengths.push_back(static_cast<std::int64_t>(sequence.size()));
    return lengths;
}

PreparedJob prepare_job(const JobSpec& spec, std::int64_t micro_batch_tokens) {
    CheckpointReader reader(spec.model);
    require_unquantized(reader);
    ModelGraph graph = build_model_graph(reader.config(), (spec.model / "config.json").string());
    require_tensors(reader, graph);
    require_biases_fit(reader, graph);

    CalibrationStore calibration = load_calibration_store(
        spec.calibration.tokens,
        {spec.calibration.sequences, spec.calibration.sequence_length, graph.vocab_size,
         spec.model / "tokenizer.json", spec.calibration.allow_tokenizer_mismatch});
    std::vector<BatchShard> shards = plan_batch_shards(lengths_of(calibration.sequences), micro_batch_tokens);

    QuantizationScheme scheme = planned_scheme(spec, reader, graph);
    OutputLayout layout = plan_output(reader, graph, scheme, spec.output.max_shard_size);
    const bool head = scheme.quantizes_head();
    return {spec,
            std::move(reader),
            std::move(graph),
            std::move(calibration),
            std::move(shards),
            std::move(scheme),
            std::move(layout),
            head};
}

QuantizationScheme scheme_before_target(const PreparedJob& job) {
    return scheme_of_job(job.spec, job.graph, is_bf16(job.reader, job.graph));
}

std::vector<PreparedJob> prepare_jobs(const JobSpec& spec, std::int64_t micro_batch_tokens) {
    const std::vector<JobSpec> singles = single_jobs(spec);
    std::vector<PreparedJob> jobs{prepare_job(singles.front(), micro_batch_tokens)};
    for (std::size_t i = 1; i < singles.size(); ++i) {
        PreparedJob job = jobs.front();
        job.spec = singles[i];
        job.scheme = planned_scheme(job.spec, job.reader, job.graph);
        job.layout = plan_output(job.reader, job.graph, job.scheme, job.spec.output.max_shard_size);
        jobs.push_back(std::move(job));
    }
    const bool head = std::ranges::any_of(jobs, [](const auto& job) { return job.scheme.quantizes_head(); });
    for (PreparedJob& job : jobs) job.head = head;
    return jobs;
}

}  // namespace quantmill
