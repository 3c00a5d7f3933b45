#include "workers/checkpoint_output.h"

#include <algorithm>

#include "jobs/text.h"
#include "pipeline/model_card.h"
#include "workers/placement.h"
#include "workers/version.h"

namespace quantmill {
namespace {

// Whether any linear has scales that may be negative.
bool signs_scales(const PreparedJob& job) {
    bool any = false;
    for_each_quantized(job.graph, job.scheme,
                       [&](int, std::size_t, const LinearGroup&, const GptqOptions& options) {
                           any = any || options.grid.signed_scales;
                       });
    return any;
}

QuantizationConfig config_of(const PreparedJob& job) {
    const QuantizationSpec& q = job.spec.quantization;
    const GptqOptions& usual = job.scheme.usual();
    return {.bits = usual.grid.bits,
            .group_size = q.group_size,
            .sym = q.sym,
            .desc_act = q.desc_act,
            .damp_percent = q.damp_percent,
            .damp_auto_increment = q.damp_auto_increment,
            .true_sequential = q.true_sequential,
            .format = gptq_format_from(job.spec.output.format),
            .version = version_number(),
            .error_propagation_alpha = q.error_propagation_alpha,
            .act_group_aware = q.act_group_aware,
            .static_groups = q.static_groups,
            .scale_search = q.scale_search,
            .signed_scales = signs_scales(job),
            .scale_rounding = usual.grid.bf16_scales ? "bf16" : "fp16",
            .lm_head = job.scheme.quantizes_head(),
            .dynamic = dynamic_of(job.graph, job.scheme),
            .modules_in_block_to_quantize = modules_in_block_of(job.graph, job.scheme)};
}

std::string yes_no(bool value) { return value ? "true" : "false"; }

// A row a kind of linear: how far the quantized outputs are from the original ones.
std::vector<std::vector<std::string>> results_table(const Report& report) {
    std::vector<std::vector<std::string>> rows{{"linear", "mean squared weight error", "loss per output"}};
    std::vector<std::string> kinds;
    for (const LinearReport& linear : report.linears) {
        const std::string kind = linear.module.substr(linear.module.rfind('.') + 1);
        if (std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) kinds.push_back(kind);
    }
    for (const std::string& kind : kinds) {
        double error = 0.0, loss = 0.0, count = 0.0;
        for (const LinearReport& linear : report.linears) {
            if (!linear.module.ends_with("." + kind)) continue;
            error += linear.mean_squared_error;
            loss += linear.loss / static_cast<double>(linear.rows);
            count += 1.0;
        }
        rows.push_back({kind, fmt::format("{:.3g}", error / count), fmt::format("{:.3g}", loss / count)});
    }
    return rows;
}

std::size_t longest_sequence(const PreparedJob& job) {
    std::size_t longest = 0;
    for (const auto& sequence : job.calibration.sequences) longest = std::max(longest, sequence.size());
    return longest;
}

ModelCard card_of(const PreparedJob& job, const Report& report) {
    const QuantizationSpec& q = job.spec.quantization;
    ModelCard card;
    card.base_model = base_model_name(job.spec.model);
    const int bits = job.scheme.usual().grid.bits;
    const bool mixed = !dynamic_of(job.graph, job.scheme).is_null();
    card.title = fmt::format("{}, {}{}-bit GPTQ", card.base_model.substr(card.base_model.rfind('/') + 1),
                             mixed ? "mostly " : "", bits);
    card.version = version_number();
    card.quantization = {
        {"bits", std::to_string(bits) + (mixed ? ", others by quantization_config.dynamic" : "")},
        {"group_size", std::to_string(q.group_size)},
        {"sym", yes_no(q.sym)},
        {"desc_act", yes_no(q.desc_act)},
        {"act_group_aware", yes_no(q.act_group_aware)},
        {"static_groups", yes_no(q.static_groups)},
        {"scale_search", q.scale_search},
        {"signed_scales", yes_no(q.signed_scales)},
        {"scale_rounding", job.scheme.usual().grid.bf16_scales ? "bf16" : "fp16"},
        {"damp_percent", q.damp_percent ? fmt::format("{}", *q.damp_percent) : "auto"},
        {"damp_auto_increment", fmt::format("{}", q.damp_auto_increment)},
        {"true_sequential", yes_no(q.true_sequential)},
        {"checkpoint_format", job.spec.output.format},
        {"bits per weight, all overhead counted", fmt::format("{:.2f}", bits_per_weight(report.linears))},
        {"size",
         fmt::format("{} (original: {})", bytes_text(report.output_bytes), bytes_text(report.source_bytes))}};
    if (q.error_propagation_alpha > 0.0) {
        card.quantization.emplace_back("error_propagation_alpha",
                                       fmt::format("{}", q.error_propagation_alpha));
    }
    card.calibration = {{"sequences", std::to_string(report.sequences)},
                        {"sequence_length, longest", std::to_string(longest_sequence(job))},
                        {"tokens", std::to_string(report.tokens)}};
    card.results = results_table(report);
    return card;
}

}  // namespace

std::vector<std::string> CheckpointOutput::file_names(const PreparedJob& job) {
    std::vector<std::string> names{"README.md",   "quantize_log.csv",     "report.json",
                                   "config.json", "quantize_config.json", "model.safetensors.index.json"};
    for (const OutputShard& shard : job.layout.shards) names.push_back(shard.file_name);
    return names;
}

CheckpointOutput::CheckpointOutput(const PreparedJob& job, Control& control, Backend& backend)
    : CheckpointOutput(job, control, backend,
                       output_shards_of_rank(job.layout.shards.size(), control.rank(), control.size())) {}

CheckpointOutput::CheckpointOutput(const PreparedJob& job, Control& control, Backend& backend,
                                   const std::vector<std::size_t>& owned)
    : job_(job),
      control_(control),
      backend_(backend),
      format_(gptq_format_from(job.spec.output.format)),
      writer_(job.spec.output.directory, job.layout.shards, owned),
      lane_(backend.make_copy_lane()),
      writes_(kMostWaiting) {}

void CheckpointOutput::pin_ahead() {
    writes_.submit(0, [this] {
        std::vector<EncodedLinear::HostMemory> pinned;  // given back together, for write_group to take again
        std::size_t bytes = 0;
        for_each_quantized(
            job_.graph, job_.scheme,
            [&](int, std::size_t, const LinearGroup& group, const GptqOptions& options) {
                for (const Linear& linear : group.linears) {
                    if (bytes >= kMostWaiting) return;
                    const QuantizationGrid grid = grid_for(options.grid, linear.columns);
                    bytes += pinned.emplace_back(backend_, linear.rows, linear.columns, grid).bytes();
                }
            });
    });
}

void CheckpointOutput::copy_untouched() {
    for (const std::string& name : job_.layout.copied) {
        if (writer_.owns(name)) writes_.submit(kReadPiece, [this, name] { copy_tensor(name); });
    }
}

void CheckpointOutput::copy_tensor(const std::string& name) {
    read_finite(job_.reader, name, [&](std::uint64_t offset, const std::byte* data, std::size_t bytes) {
        writer_.write_piece(name, offset, data, bytes);
    });
}

std::vector<std::byte> CheckpointOutput::encode_bias(const std::string& name, const Tensor& bias) const {
    Tensor half = backend_.empty(bias.shape(), DType::f16, name);
    backend_.convert(bias, half);
    std::vector<std::byte> bytes(half.view().size_bytes());
    backend_.copy_to_host(half, bytes.data());
    return bytes;
}

void CheckpointOutput::write(const std::string& name, std::span<const std::byte> bytes,
                             std::shared_ptr<const void> owner) {
    writes_.submit(bytes.size(), [this, name, bytes, owner = std::move(owner)] {
        writer_.write(name, bytes.data(), bytes.size());
    });
}

// On the writing thread.
void CheckpointOutput::place(const std::string& name, std::span<const std::byte> bytes,
                             const EncodedLinear::Sink& elsewhere) {
    if (writer_.owns(name)) {
        writer_.write(name, bytes.data(), bytes.size());
    } else if (elsewhere) {
        elsewhere(name, bytes.data(), bytes.size());
    }
}

void CheckpointOutput::write_group(int block, const LinearGroup& group, const QuantizedLinear& quantized,
                                   const std::vector<LinearWeights>& weights,
                                   const EncodedLinear::Sink& elsewhere) {
    const auto wanted = [&](const std::string& name) { return elsewhere || writer_.owns(name); };
    std::int64_t row = 0;
    for (std::size_t l = 0; l < group.linears.size(); ++l) {
        const Linear& linear = group.linears[l];
        const std::string prefix = job_.graph.in_block(block, linear.name);
        const auto tensors = gptq_tensors(prefix, linear.rows, linear.columns, quantized.grid);
        if (std::any_of(tensors.begin(), tensors.end(), [&](const auto& t) { return wanted(t.name); })) {
            const auto encoded =
                std::make_shared<EncodedLinear>(backend_, *lane_, quantized, row, row + linear.rows);
            writes_.submit(encoded->bytes(), [this, prefix, encoded, elsewhere] {
                encoded->write(prefix, format_,
                               [&](const std::string& name, const void* data, std::size_t bytes) {
                                   place(name, {static_cast<const std::byte*>(data), bytes}, elsewhere);
                               });
            });
        }
        if (const std::string bias = prefix + ".bias"; linear.bias && wanted(bias)) {
            auto bytes = encode_bias(bias, weights[l].bias);
            const std::size_t count = bytes.size();
            writes_.submit(
                count, [this, bias, bytes = std::move(bytes), elsewhere] { place(bias, bytes, elsewhere); });
        }
        row += linear.rows;
    }
}

void CheckpointOutput::finish(const Report& report) {
    writes_.finish();
    writer_.finish();
    control_.barrier();
    if (control_.rank() == 0) write_documents(report);
    control_.barrier();
}

void CheckpointOutput::write_documents(const Report& report) const {
    const std::filesystem::path& directory = job_.spec.output.directory;
    const QuantizationConfig config = config_of(job_);
    write_text(directory / "README.md", to_markdown(card_of(job_, report), job_.spec.model));
    write_text(directory / "quantize_log.csv", to_csv(report));
    write_text(directory / "report.json", to_json(report));
    write_text(directory / "quantize_config.json", to_json(config).dump(2) + "\n");
    // Parsed again in the order of the file, so that a diff against the source shows what changed.
    const auto source = nlohmann::ordered_json::parse(read_text(job_.spec.model / "config.json"));
    write_text(directory / "config.json", quantized_config(source, config).dump(2) + "\n");
    write_text(directory / "model.safetensors.index.json", make_index_json(job_.layout.shards));
}

}  // namespace quantmill
