#include "workers/evaluate.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>

#include "comm/communicator.h"
#include "kernels/make_backend.h"
#include "pipeline/calibration_store.h"
#include "pipeline/files.h"
#include "pipeline/fingerprint.h"
#include "pipeline/forward.h"
#include "pipeline/stopwatch.h"
#include "workers/calibration_batches.h"
#include "workers/hidden_errors.h"
#include "workers/logit_head.h"
#include "workers/placement.h"
#include "workers/prepared_job.h"
#include "workers/version.h"

namespace quantmill {
namespace {

struct OpenModel {
    CheckpointReader reader;
    ModelGraph graph;
    explicit OpenModel(const std::filesystem::path& directory)
        : reader(directory),
          graph(build_model_graph(reader.config(), (directory / "config.json").string())) {}
};

struct Inputs {
    OpenModel model;
    std::unique_ptr<OpenModel> reference;
    CalibrationStore store;
    std::vector<BatchShard> shards;
};

// The reference must differ in its weights only.
std::unique_ptr<OpenModel> open_reference(const EvalCommand& command, const ModelGraph& graph) {
    if (!command.reference) return nullptr;
    auto reference = std::make_unique<OpenModel>(*command.reference);
    const ModelGraph& other = reference->graph;
    if (other.architecture != graph.architecture || other.blocks != graph.blocks ||
        other.hidden_size != graph.hidden_size || other.vocab_size != graph.vocab_size) {
        throw BadInput(
            "--reference {} is not the model that {} was made of: {}, {} blocks, hidden size {}, vocabulary "
            "{}, where the other is {}, {}, {}, {}",
            command.reference->string(), command.model.string(), other.architecture, other.blocks,
            other.hidden_size, other.vocab_size, graph.architecture, graph.blocks, graph.hidden_size,
            graph.vocab_size);
    }
    return reference;
}

// What the run that made a checkpoint told; an empty object for those of other programs.
nlohmann::json report_of(const std::filesystem::path& model) {
    const std::filesystem::path file = model / "report.json";
    if (!std::filesystem::exists(file)) return nlohmann::json::object();
    nlohmann::json report = nlohmann::json::parse(read_text(file), nullptr, false);
    return report.is_object() ? report : nlohmann::json::object();
}

std::optional<double> predicted_ratio(const nlohmann::json& report) {
    const nlohmann::json ratio =
        report.value("/bit_budget/predicted_perplexity_ratio"_json_pointer, nlohmann::json());
    if (!ratio.is_number()) return std::nullopt;
    return ratio.get<double>();
}

// Perplexity on what the scales were fitted to says nothing about other text.
void refuse_calibration_tokens(const EvalCommand& command, const CalibrationStore& store) {
    const nlohmann::json report = report_of(command.model);
    if (command.allow_calibration_tokens || !report.contains("calibration_sequences")) return;
    std::set<std::string> calibrated;
    for (const auto& fingerprint : report.at("calibration_sequences")) {
        if (fingerprint.is_string()) calibrated.insert(fingerprint.get<std::string>());
    }
    const std::vector<std::string> fingerprints = fingerprints_of_sequences(store.sequences);
    const auto known = [&](const std::string& fingerprint) { return calibrated.contains(fingerprint); };
    const auto count = std::count_if(fingerprints.begin(), fingerprints.end(), known);
    if (count == 0) return;
    throw BadInput(
        "{} of the {} sequences, the first of them number {}, were used to calibrate {} (its report.json "
        "says so): measured on them it would look better than it is. Take held-out text, or ask for it "
        "with --allow-calibration-tokens",
        count, fingerprints.size(),
        std::find_if(fingerprints.begin(), fingerprints.end(), known) - fingerprints.begin(),
        command.model.string());
}

CalibrationStore read_store(const EvalCommand& command, const std::filesystem::path& file,
                            const ModelGraph& graph) {
    CalibrationStore store =
        load_calibration_store(file, {command.sequences, command.sequence_length, graph.vocab_size,
                                      command.model / "tokenizer.json", command.allow_tokenizer_mismatch});
    refuse_calibration_tokens(command, store);
    return store;
}

// Only rank 0 has the windows of a text, in a directory that other hosts may not see.
CalibrationStore share_text(const EvalCommand& command, Control& control, const TokenizedText* text,
                            const ModelGraph& graph) {
    nlohmann::json message;
    if (control.rank() == 0) {
        // A launcher that numbers ranks in its own way may have had another process do it.
        std::unique_ptr<TokenizedText> late;
        if (text == nullptr) text = (late = std::make_unique<TokenizedText>(text_request(command))).get();
        const CalibrationStore store = read_store(command, text->store(), graph);
        message = {store.sequences, store.source};
    }
    message = nlohmann::json::parse(control.broadcast(message.dump(), 0));
    CalibrationStore store;
    message.at(0).get_to(store.sequences);
    message.at(1).get_to(store.source);
    return store;
}

Inputs prepare(const EvalCommand& command, Control& control, const TokenizedText* text,
               std::int64_t micro_batch_tokens) {
    Inputs inputs = rank_zero_first(control, [&] {
        OpenModel model(command.model);
        auto reference = open_reference(command, model.graph);
        CalibrationStore store;
        if (command.text.empty()) store = read_store(command, command.tokens, model.graph);
        return Inputs{std::move(model), std::move(reference), std::move(store), {}};
    });
    if (!command.text.empty()) inputs.store = share_text(command, control, text, inputs.model.graph);
    inputs.shards = plan_batch_shards(lengths_of(inputs.store.sequences), micro_batch_tokens);
    return inputs;
}

// One model on this rank's tokens.
class ModelWalk {
public:
    ModelWalk(Backend& backend, Control& control, Communicator& communicator, const OpenModel& model,
              const std::vector<BatchShard>& shards)
        : graph_(model.graph),
          loader_(backend, control, communicator, model.reader, model.graph),
          batches_(backend, model.graph, own_shards(shards, control)),
          forward_(backend, model.graph, limits_of(shards).tokens, limits_of(shards).length) {
        loader_.prefetch_block(0);
    }

    void embed(const std::vector<std::vector<std::int32_t>>& sequences) {
        batches_.embed(sequences, loader_.load(graph_.embedding, {graph_.vocab_size, graph_.hidden_size}));
    }
    void run_block(int block) {
        const BlockWeights weights = loader_.load_block_for_forward(block);
        loader_.prefetch_block(block + 1);
        batches_.for_each(use_of_stages(graph_, 0, graph_.stages.size()),
                          [&](const auto&, const BatchState& state) { forward_.run_block(weights, state); });
    }
    CalibrationBatches& batches() { return batches_; }
    LogitHead head(Backend& backend) { return {backend, loader_, graph_}; }

private:
    static std::span<const BatchShard> own_shards(const std::vector<BatchShard>& shards,
                                                  const Control& control) {
        const RowRange range =
            shards_of_rank(static_cast<std::int64_t>(shards.size()), control.rank(), control.size());
        return std::span(shards).subspan(static_cast<std::size_t>(range.begin),
                                         static_cast<std::size_t>(range.count()));
    }

    const ModelGraph& graph_;
    WeightLoader loader_;
    CalibrationBatches batches_;
    BlockForward forward_;
};

// The tokens of a micro-batch: whose they are and what follows them.
struct TokenPlan {
    std::vector<std::size_t> sequence;
    std::vector<std::int32_t> next;  // 0 where none follows
    std::vector<bool> counted;
};

TokenPlan plan_tokens(const MicroBatch& batch, const std::vector<std::vector<std::int32_t>>& sequences) {
    TokenPlan plan;
    for (std::int64_t i = 0; i < batch.sequences.count(); ++i) {
        const auto index = static_cast<std::size_t>(batch.first_sequence + i);
        const auto& sequence = sequences[index];
        for (std::size_t t = 0; t < sequence.size(); ++t) {
            const bool counted = t + 1 < sequence.size();
            plan.sequence.push_back(index);
            plan.next.push_back(counted ? sequence[t + 1] : 0);
            plan.counted.push_back(counted);
        }
    }
    return plan;
}

// Calls visit(batch, hidden, reference's hidden) for all micro-batches of this rank; no reference: empty.
template <class Visit>
void for_each_pair(ModelWalk& model, ModelWalk* reference, const Visit& visit) {
    const StateUse use{.reads_hidden = true};
    CalibrationBatches::Pass ours(model.batches(), use);
    std::unique_ptr<CalibrationBatches::Pass> theirs;
    if (reference != nullptr) {
        theirs = std::make_unique<CalibrationBatches::Pass>(reference->batches(), use);
    }
    for (const auto& batch : model.batches().batches()) {
        const BatchState state = ours.next();
        visit(batch.plan, state.hidden, theirs ? theirs->next().hidden : TensorView{});
    }
}

// This rank's part of the sums.
class Measurement {
public:
    Measurement(const EvalCommand& command, const Inputs& inputs, Control& control, Backend& backend)
        : command_(command),
          inputs_(inputs),
          backend_(backend),
          communicator_(make_communicator("auto", control, backend)),
          model_(backend, control, *communicator_, inputs.model, inputs.shards) {
        const std::size_t sequences = inputs.store.sequences.size();
        for (auto* sums : {&tokens, &negative_log}) sums->resize(sequences);
        if (!inputs.reference) return;
        reference_ =
            std::make_unique<ModelWalk>(backend, control, *communicator_, *inputs.reference, inputs.shards);
        for (auto* sums : {&reference_negative_log, &divergence, &same_top}) sums->resize(sequences);
        hidden.resize(static_cast<std::size_t>(inputs.model.graph.blocks) * 2 * sequences);
    }

    void run() {
        model_.embed(inputs_.store.sequences);
        if (reference_) reference_->embed(inputs_.store.sequences);
        for (int block = 0; block < inputs_.model.graph.blocks; ++block) {
            model_.run_block(block);
            if (!reference_) continue;
            reference_->run_block(block);
            compare_hidden(block);
        }
        predict();
    }

    // Per sequence; hidden: [blocks, 2, sequences].
    std::vector<double> tokens, negative_log, reference_negative_log, divergence, same_top, hidden;

private:
    // Summed in the order of each sequence's tokens, so that ranks and micro-batches do not matter.
    void compare_hidden(int block) {
        HiddenErrors errors(backend_, inputs_.model.graph.hidden_size);
        const std::size_t sequences = inputs_.store.sequences.size();
        const auto sums =
            std::span(hidden).subspan(static_cast<std::size_t>(block) * 2 * sequences, 2 * sequences);
        for_each_pair(model_, reference_.get(),
                      [&](const MicroBatch& batch, TensorView ours, TensorView theirs) {
                          const TokenPlan plan = plan_tokens(batch, inputs_.store.sequences);
                          errors.each(ours, theirs, [&](std::size_t token, double error, double square) {
                              sums[plan.sequence[token]] += error;
                              sums[sequences + plan.sequence[token]] += square;
                          });
                      });
    }

    void predict() {
        const ModelGraph& graph = inputs_.model.graph;
        LogitHead head = model_.head(backend_);
        std::unique_ptr<LogitHead> reference_head;
        if (reference_) reference_head = std::make_unique<LogitHead>(reference_->head(backend_));
        std::unique_ptr<LogitFile> file;
        if (command_.logits) {
            file = std::make_unique<LogitFile>(*command_.logits, tokens_of_shards(inputs_.shards),
                                               graph.vocab_size);
        }
        for_each_pair(model_, reference_.get(),
                      [&](const MicroBatch& batch, TensorView ours, TensorView theirs) {
                          const TokenPlan plan = plan_tokens(batch, inputs_.store.sequences);
                          count_tokens(plan);
                          for (std::int64_t first = 0; first < ours.extent(0); first += LogitHead::kRows) {
                              const std::int64_t last = std::min(first + LogitHead::kRows, ours.extent(0));
                              const TensorView logits = head.logits(ours.rows(first, last));
                              if (file) file->append(backend_, logits);
                              add_losses(plan, first, logits, negative_log);
                              if (!reference_head) continue;
                              const TensorView expected = reference_head->logits(theirs.rows(first, last));
                              add_losses(plan, first, expected, reference_negative_log);
                              add_distances(plan, first, expected, logits);
                          }
                      });
        if (file) file->finish();
    }

    void add_losses(const TokenPlan& plan, std::int64_t first, ConstTensorView logits,
                    std::vector<double>& sums) {
        const auto begin = static_cast<std::size_t>(first);
        const auto rows = static_cast<std::size_t>(logits.extent(0));
        const auto losses = backend_.cross_entropy(logits, std::span(plan.next).subspan(begin, rows));
        for (std::size_t row = 0; row < rows; ++row) {
            if (plan.counted[begin + row]) sums[plan.sequence[begin + row]] += losses[row];
        }
    }

    void count_tokens(const TokenPlan& plan) {
        for (std::size_t token = 0; token < plan.counted.size(); ++token) {
            if (plan.counted[token]) tokens[plan.sequence[token]] += 1.0;
        }
    }

    void add_distances(const TokenPlan& plan, std::int64_t first, ConstTensorView reference,
                       ConstTensorView logits) {
        const auto begin = static_cast<std::size_t>(first);
        const auto distances = backend_.logit_distances(reference, logits);
        for (std::size_t row = 0; row < distances.size(); ++row) {
            if (!plan.counted[begin + row]) continue;
            divergence[plan.sequence[begin + row]] += distances[row].divergence;
            same_top[plan.sequence[begin + row]] += distances[row].same_top ? 1.0 : 0.0;
        }
    }

    const EvalCommand& command_;
    const Inputs& inputs_;
    Backend& backend_;
    std::unique_ptr<Communicator> communicator_;
    ModelWalk model_;
    std::unique_ptr<ModelWalk> reference_;
};

std::vector<double> relative_errors(const std::vector<double>& hidden, int blocks, std::size_t sequences) {
    std::vector<double> errors;
    for (std::size_t block = 0; !hidden.empty() && block < static_cast<std::size_t>(blocks); ++block) {
        double error = 0.0;
        double square = 0.0;
        for (std::size_t s = 0; s < sequences; ++s) {
            error += hidden[block * 2 * sequences + s];
            square += hidden[(block * 2 + 1) * sequences + s];
        }
        errors.push_back(std::sqrt(error / square));
    }
    return errors;
}

// Of everything that is stored for the weights of the linears of all blocks.
double stored_bits_per_weight(const OpenModel& model) {
    double bits = 0.0;
    double weights = 0.0;
    for (int block = 0; block < model.graph.blocks; ++block) {
        for (const Stage& stage : model.graph.stages) {
            for (const Linear& linear : stage.group.linears) {
                weights += static_cast<double>(linear.rows * linear.columns);
                for (const char* part : {".weight", ".qweight", ".qzeros", ".scales", ".g_idx"}) {
                    const std::string name = model.graph.in_block(block, linear.name) + part;
                    if (!model.reader.contains(name)) continue;
                    bits += 8.0 * static_cast<double>(model.reader.find(name).bytes());
                }
            }
        }
    }
    return bits / weights;
}

}  // namespace

Evaluation measure(const EvalCommand& command, Control& control, const TokenizedText* text) {
    if (command.logits && control.size() > 1) {
        throw BadInput("--logits writes one file in order: run `quantmill eval` on one rank for it");
    }
    const Stopwatch watch;
    const auto backend = make_backend(command.backend, control.local_rank(), control.local_size());
    const Inputs inputs = prepare(command, control, text, backend->micro_batch_tokens());
    const std::size_t sequences = inputs.store.sequences.size();
    Measurement part(command, inputs, control, *backend);
    part.run();

    // Each sequence is a rank's own: adding the other ranks' zeros is exact.
    Evaluation result;
    result.sums = {fingerprints_of_sequences(inputs.store.sequences),
                   control.all_sum(part.tokens),
                   control.all_sum(part.negative_log),
                   control.all_sum(part.reference_negative_log),
                   control.all_sum(part.divergence),
                   control.all_sum(part.same_top)};
    result.hidden_errors =
        relative_errors(control.all_sum(part.hidden), inputs.model.graph.blocks, sequences);
    if (std::all_of(result.sums.tokens.begin(), result.sums.tokens.end(),
                    [](double count) { return count == 0.0; })) {
        throw BadInput("{}: no sequence has two tokens or more", command.tokens.string());
    }
    result.model = command.model.string();
    if (command.reference) result.reference = command.reference->string();
    result.predicted_ratio = predicted_ratio(report_of(command.model));
    result.architecture = inputs.model.graph.architecture;
    result.source = inputs.store.source;
    result.version = short_version();
    result.backend = backend->description();
    result.model_bytes = inputs.model.reader.total_bytes();
    result.bits_per_weight = stored_bits_per_weight(inputs.model);
    result.seconds = watch.seconds();
    return result;
}

void evaluate(const EvalCommand& command, Control& control, const TokenizedText* text) {
    const Evaluation result = measure(command, control, text);
    if (control.rank() != 0) return;
    fmt::print("{}", evaluation_text(result));
    if (command.json) write_text(*command.json, json_text(to_json(result)));
}

}  // namespace quantmill
