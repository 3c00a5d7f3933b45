#include "workers/evaluate.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

#include "jobs/text.h"
#include "kernels/make_backend.h"
#include "pipeline/calibration_store.h"
#include "pipeline/forward.h"
#include "pipeline/stopwatch.h"
#include "workers/calibration_batches.h"
#include "workers/placement.h"
#include "workers/prepared_job.h"
#include "workers/version.h"

namespace quantmill {
namespace {

constexpr std::int64_t kLogitRows = 256;  // logits [256, V] fit any memory

// Receives the logits f32 [rows, V] of consecutive tokens of a micro-batch.
using LogitSink = std::function<void(std::int64_t first_token, TensorView logits)>;

// The model's last steps: final norm and lm_head.
class LogitHead {
public:
    LogitHead(Backend& backend, WeightLoader& loader, const ModelGraph& graph)
        : backend_(backend),
          graph_(graph),
          norm_(loader.load_as(graph.final_norm, {graph.hidden_size}, DType::f32)),
          head_(loader.to_forward(loader.load(graph.lm_head, {graph.vocab_size, graph.hidden_size}))),
          normed_(backend, {kLogitRows, graph.hidden_size}, backend.activation_dtype(),
                  "normed hidden states"),
          logits_(backend, {kLogitRows, graph.vocab_size}, DType::f32, "logits") {}

    void apply(TensorView hidden, const LogitSink& sink) {
        const std::int64_t tokens = hidden.extent(0);
        for (std::int64_t first = 0; first < tokens; first += kLogitRows) {
            const std::int64_t last = std::min(first + kLogitRows, tokens);
            const TensorView normed = normed_.view().leading({last - first, graph_.hidden_size});
            const TensorView logits = logits_.view().leading({last - first, graph_.vocab_size});
            backend_.rms_norm(hidden.rows(first, last), norm_, graph_.norm_eps, normed);
            backend_.linear(normed, head_, {}, logits);
            sink(first, logits);
        }
    }

private:
    Backend& backend_;
    const ModelGraph& graph_;
    Tensor norm_, head_, normed_, logits_;
};

// Writes f32 logits [tokens of the job, V] as one safetensors file; ranks do not share it, so one rank only.
class LogitFile {
public:
    LogitFile(const std::filesystem::path& path, std::int64_t tokens, std::int64_t vocab) : file_(path) {
        std::vector<StoredTensor> tensors{{"logits", "F32", {tokens, vocab}, 0, 0}};
        tensors.front().end = static_cast<std::uint64_t>(tokens * vocab) * sizeof(float);
        const std::string header = make_safetensors_header(tensors, {});
        file_.write(0, header.data(), header.size());
        offset_ = header.size();
    }
    void append(Backend& backend, ConstTensorView logits) {
        std::vector<std::byte> bytes(logits.size_bytes());
        backend.copy_to_host(logits, bytes.data());
        file_.write(offset_, bytes.data(), bytes.size());
        offset_ += bytes.size();
    }
    void finish() { file_.finish(); }

private:
    OutputFile file_;
    std::uint64_t offset_ = 0;
};

// The token after each token of a sequence; the last one has none.
struct Targets {
    std::vector<std::int32_t> ids;  // 0 where there is none
    std::vector<bool> counted;
};

Targets targets_of(const MicroBatch& batch, const std::vector<std::vector<std::int32_t>>& sequences) {
    Targets targets;
    for (std::int64_t i = 0; i < batch.sequences.count(); ++i) {
        const auto& sequence = sequences[static_cast<std::size_t>(batch.first_sequence + i)];
        for (std::size_t t = 0; t < sequence.size(); ++t) {
            const bool counted = t + 1 < sequence.size();
            targets.ids.push_back(counted ? sequence[t + 1] : 0);
            targets.counted.push_back(counted);
        }
    }
    return targets;
}

struct Likelihood {
    std::vector<double> negative_log;  // a sequence
    std::int64_t tokens = 0;           // predicted
};

// Sums in token order within a sequence, so that ranks and micro-batches do not matter.
void add_batch(Backend& backend, const MicroBatch& batch, const Targets& targets, std::int64_t first,
               ConstTensorView logits, Likelihood& likelihood) {
    const auto rows = static_cast<std::size_t>(logits.extent(0));
    const auto begin = static_cast<std::size_t>(first);
    const std::vector<double> losses =
        backend.cross_entropy(logits, std::span(targets.ids).subspan(begin, rows));
    for (std::size_t row = 0; row < rows; ++row) {
        if (!targets.counted[begin + row]) continue;
        const auto& offsets = batch.sequences.offsets;
        const auto after =
            std::upper_bound(offsets.begin(), offsets.end(), static_cast<std::int32_t>(begin + row));
        const auto sequence = batch.first_sequence + std::distance(offsets.begin(), after) - 1;
        likelihood.negative_log[static_cast<std::size_t>(sequence)] += losses[row];
        ++likelihood.tokens;
    }
}

struct Evaluation {
    CheckpointReader reader;
    ModelGraph graph;
    CalibrationStore store;
    std::vector<BatchShard> shards;
};

Evaluation prepare(const EvalCommand& command, std::int64_t micro_batch_tokens) {
    CheckpointReader reader(command.model);
    ModelGraph graph = build_model_graph(reader.config(), (command.model / "config.json").string());
    CalibrationStore store = load_calibration_store(
        command.tokens, {command.sequences, command.sequence_length, graph.vocab_size,
                         command.model / "tokenizer.json", command.allow_tokenizer_mismatch});
    auto shards = plan_batch_shards(lengths_of(store.sequences), micro_batch_tokens);
    return {std::move(reader), std::move(graph), std::move(store), std::move(shards)};
}

Likelihood forward(const EvalCommand& command, const Evaluation& job, Control& control, Backend& backend) {
    const auto communicator = make_communicator("auto", control, backend);
    WeightLoader loader(backend, control, *communicator, job.reader, job.graph);
    const RowRange range =
        shards_of_rank(static_cast<std::int64_t>(job.shards.size()), control.rank(), control.size());
    CalibrationBatches batches(
        backend, job.graph,
        std::span(job.shards)
            .subspan(static_cast<std::size_t>(range.begin), static_cast<std::size_t>(range.count())));
    const BatchLimits limits = limits_of(job.shards);
    BlockForward block_forward(backend, job.graph, limits.tokens, limits.length);

    loader.prefetch_block(0);
    batches.embed(job.store.sequences,
                  loader.load(job.graph.embedding, {job.graph.vocab_size, job.graph.hidden_size}));
    for (int block = 0; block < job.graph.blocks; ++block) {
        const BlockWeights weights = loader.load_block_for_forward(block);
        loader.prefetch_block(block + 1);
        const StateUse use = use_of_stages(job.graph, 0, job.graph.stages.size());
        batches.for_each(
            use, [&](const auto&, const BatchState& state) { block_forward.run_block(weights, state); });
    }

    std::optional<LogitFile> file;
    if (command.logits) {
        std::int64_t tokens = 0;
        for (const BatchShard& shard : job.shards) tokens += shard.tokens();
        file.emplace(*command.logits, tokens, job.graph.vocab_size);
    }
    Likelihood likelihood{std::vector<double>(job.store.sequences.size()), 0};
    LogitHead head(backend, loader, job.graph);
    batches.for_each({.reads_hidden = true}, [&](const auto& batch, const BatchState& state) {
        const Targets targets = targets_of(batch.plan, job.store.sequences);
        head.apply(state.hidden, [&](std::int64_t first, TensorView logits) {
            add_batch(backend, batch.plan, targets, first, logits, likelihood);
            if (file) file->append(backend, logits);
        });
    });
    if (file) file->finish();
    return likelihood;
}

void print(const EvalCommand& command, const Evaluation& job, const nlohmann::ordered_json& result) {
    fmt::print("{}  perplexity {:.4f}  ({} sequences, {} tokens, {})\n", job.graph.architecture,
               result.at("perplexity").get<double>(), job.store.sequences.size(),
               result.at("tokens").get<std::int64_t>(), seconds_text(result.at("seconds").get<double>()));
    if (command.json) write_text(*command.json, result.dump(2) + "\n");
}

}  // namespace

void evaluate(const EvalCommand& command, Control& control) {
    if (command.logits && control.size() > 1) {
        throw BadInput("--logits writes one file in order: run `quantmill eval` on one rank for it");
    }
    const Stopwatch watch;
    const auto backend = make_backend(command.backend, control.local_rank(), control.local_size());
    const Evaluation job =
        rank_zero_first(control, [&] { return prepare(command, backend->micro_batch_tokens()); });
    Likelihood likelihood = forward(command, job, control, *backend);

    // Each sequence is a rank's own: adding the other ranks' zeros is exact.
    likelihood.negative_log = control.all_sum(likelihood.negative_log);
    const double tokens = control.all_sum({static_cast<double>(likelihood.tokens)}).front();
    if (tokens == 0.0) throw BadInput("{}: no sequence has two tokens or more", command.tokens.string());
    double sum = 0.0;
    for (const double loss : likelihood.negative_log) sum += loss;
    const double perplexity = std::exp(sum / tokens);
    if (control.rank() != 0) return;
    print(command, job,
          {{"perplexity", perplexity},
           {"mean_negative_log_likelihood", sum / tokens},
           {"tokens", static_cast<std::int64_t>(tokens)},
           {"sequences", job.store.sequences.size()},
           {"model_bytes", job.reader.total_bytes()},
           {"seconds", watch.seconds()},
           {"version", short_version()},
           {"backend", backend->description()}});
}

}  // namespace quantmill
