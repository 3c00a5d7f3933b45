#include "jobs/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "jobs/text.h"

namespace quantmill {

namespace {

constexpr int indent = 15;  // the column in which values begin

// Appends "Model          llama …": the label once, later lines of the same value below its first.
void add_lines(std::string& text, const std::string& label, const std::vector<std::string>& lines) {
    for (std::size_t i = 0; i < lines.size(); ++i)
        text += fmt::format("{:<{}}{}\n", i == 0 ? label : "", indent, lines[i]);
}

void add_model(std::string& text, const PlannedModel& model) {
    add_lines(
        text, "Model",
        {fmt::format("{}: {} ({}), {} blocks", model.name, model.family, model.architecture, model.blocks),
         fmt::format("{} parameters, {} {} in {} file{}", count_text(model.parameters),
                     bytes_text(model.bytes), model.dtype, model.files, model.files == 1 ? "" : "s")});
}

void add_quantization(std::string& text, const PlannedQuantization& quantization,
                      std::int64_t model_parameters) {
    const double share = 100.0 * static_cast<double>(quantization.parameters) /
                         static_cast<double>(std::max<std::int64_t>(model_parameters, 1));
    add_lines(
        text, "Quantization",
        {quantization.scheme, fmt::format("{} linears: {} of the parameters ({:.0f}%)", quantization.linears,
                                          count_text(quantization.parameters), share)});
    std::vector<std::vector<std::string>> rows;
    for (const auto& group : quantization.groups)
        rows.push_back(
            {group.name, fmt::format("{} x {}", group.rows, group.columns), list_text(group.linears)});
    text += table_text(rows, "lrl", indent);
    if (!quantization.left_alone.empty())
        add_lines(text, "", {"left alone: " + list_text(quantization.left_alone)});
}

void add_calibration(std::string& text, const PlannedCalibration& calibration) {
    add_lines(text, "Calibration",
              {calibration.tokens,
               fmt::format("{} sequences of up to {} tokens, {} tokens in all", calibration.sequences,
                           calibration.longest, count_text(calibration.token_count)),
               fmt::format("{} shards, {} micro-batches", calibration.shards, calibration.micro_batches)});
    if (!calibration.hessians.empty()) add_lines(text, "", {calibration.hessians});
}

void add_output(std::string& text, const Plan& plan) {
    const auto bytes = std::accumulate(plan.files.begin(), plan.files.end(), std::uint64_t{0},
                                       [](auto sum, const auto& file) { return sum + file.bytes; });
    add_lines(
        text, "Output",
        {fmt::format("{} ({})", plan.output_directory, plan.output_format),
         fmt::format("{} in {} file{}, {:.1f}% of the model's size", bytes_text(bytes), plan.files.size(),
                     plan.files.size() == 1 ? "" : "s",
                     100.0 * static_cast<double>(bytes) /
                         static_cast<double>(std::max<std::uint64_t>(plan.model.bytes, 1))),
         fmt::format("disk: {} needed, {} free{}", bytes_text(plan.disk_needed), bytes_text(plan.disk_free),
                     plan.disk_reclaimed == 0 ? ""
                                              : fmt::format(" once {} of an earlier run are removed",
                                                            bytes_text(plan.disk_reclaimed)))});
    add_lines(text, "and", plan.more_outputs);
}

// Ranks of which all cells but the indices read the same.
struct Fold {
    std::vector<const PlannedRank*> ranks;
    std::vector<std::string> cells;  // rows…, memory, free
};

std::vector<std::string> comparable_cells(const PlannedRank& rank) {
    std::vector<std::string> cells;
    for (const auto rows : rank.rows) cells.push_back(std::to_string(rows));
    cells.push_back(bytes_text(total_memory(rank)));
    cells.push_back(bytes_text(rank.free_memory));
    return cells;
}

std::vector<Fold> fold_ranks(const std::vector<PlannedRank>& ranks) {
    std::vector<Fold> folds;
    for (const auto& rank : ranks) {
        const auto cells = comparable_cells(rank);
        const auto alike = std::ranges::find_if(folds, [&](const Fold& fold) {
            const auto& first = *fold.ranks.front();
            return fold.cells == cells && first.sequences == rank.sequences &&
                   first.shards.size() == rank.shards.size() &&
                   first.output_files.size() == rank.output_files.size();
        });
        if (alike == folds.end())
            folds.push_back({{&rank}, cells});
        else
            alike->ranks.push_back(&rank);
    }
    return folds;
}

// "0-1" for one rank, "2-15 (2 each)" for several that hold two each; `first` is the number shown for index
// 0.
std::string owned_text(const Fold& fold, std::vector<std::int64_t> PlannedRank::* member, int first) {
    std::vector<std::int64_t> all;
    for (const auto* rank : fold.ranks)
        for (const auto index : rank->*member) all.push_back(index + first);
    auto text = spans_text(all);
    if (fold.ranks.size() > 1 && !all.empty())
        text += fmt::format(" ({} each)", (fold.ranks.front()->*member).size());
    return text;
}

std::string hosts_text(const Fold& fold) {
    std::vector<std::string> hosts;
    for (const auto* rank : fold.ranks)
        if (std::ranges::find(hosts, rank->host) == hosts.end()) hosts.push_back(rank->host);
    if (hosts.size() <= 2) return list_text(hosts);
    return fmt::format("{} … {} ({} hosts)", hosts.front(), hosts.back(), hosts.size());
}

void add_placement(std::string& text, const Plan& plan) {
    std::vector<std::string> header = {"rank", "host", "sequences", "shards"};
    std::string alignments = "llrl";
    for (const auto& group : plan.quantization.groups) {
        header.push_back(group.name + " rows");
        alignments += 'r';
    }
    for (const auto* name : {"memory", "free"}) header.emplace_back(name);
    header.emplace_back("files");
    alignments += "rrl";

    std::vector<std::vector<std::string>> rows = {header};
    for (const auto& fold : fold_ranks(plan.ranks)) {
        std::vector<std::int64_t> numbers;
        for (const auto* rank : fold.ranks) numbers.push_back(rank->rank);
        const auto sequences =
            fmt::format("{}{}", fold.ranks.front()->sequences, fold.ranks.size() > 1 ? " each" : "");
        std::vector<std::string> row = {spans_text(numbers), hosts_text(fold), sequences,
                                        owned_text(fold, &PlannedRank::shards, 0)};
        row.insert(row.end(), fold.cells.begin(), fold.cells.end());
        row.push_back(owned_text(fold, &PlannedRank::output_files, 1));
        rows.push_back(std::move(row));
    }
    text += "\nPlacement\n";
    text += table_text(rows, alignments, 2);
}

// Where the activations of the calibration tokens live between stages.
std::string activations_text(const PlannedRank& rank) {
    const std::string what = rank.recomputes ? "hidden states" : "activations";
    const std::string rest = rank.recomputes ? "; inputs of stages are recomputed" : "";
    if (rank.device_tokens == rank.tokens) return fmt::format("all {} stay on the device{}", what, rest);
    return fmt::format("{} of {} of {} tokens stay on the device, the others are streamed{}", what,
                       count_text(rank.device_tokens), count_text(rank.tokens), rest);
}

// What fills the memory of the rank that needs most.
void add_memory(std::string& text, const std::vector<PlannedRank>& ranks) {
    const auto largest = std::ranges::max_element(ranks, {}, total_memory);
    if (largest == ranks.end()) return;
    std::vector<std::vector<std::string>> rows;
    for (const auto& item : largest->memory) rows.push_back({bytes_text(item.bytes), item.name});
    rows.push_back({bytes_text(total_memory(*largest)),
                    fmt::format("together; {} free", bytes_text(largest->free_memory))});
    if (largest->host_memory > 0)
        rows.push_back({bytes_text(largest->host_memory),
                        fmt::format("of the host, {} free there: {}", bytes_text(largest->free_host_memory),
                                    activations_text(*largest))});
    text += fmt::format("\nMemory of rank {} ({}), the largest\n", largest->rank, largest->host);
    text += table_text(rows, "rl", 2);
}

// All files when they are few, else the first and the last.
void add_files(std::string& text, const std::vector<PlannedFile>& files) {
    constexpr std::size_t shown = 12;
    std::vector<std::vector<std::string>> rows;
    for (std::size_t i = 0; i < files.size(); ++i) {
        if (files.size() > shown && i == shown - 2) {
            rows.push_back({fmt::format("… {} more", files.size() - shown + 1), "", ""});
            i = files.size() - 1;
        }
        rows.push_back({files[i].name, bytes_text(files[i].bytes), fmt::format("rank {}", files[i].owner)});
    }
    text += "\nFiles\n" + table_text(rows, "lrl", 2);
}

void add_time(std::string& text, const std::optional<PlannedTime>& time) {
    text += '\n';
    if (!time) return add_lines(text, "Time", {"not measured"});
    const auto rate = time->gflops < 10'000.0 ? fmt::format("{:.0f} GFLOP/s", time->gflops)
                                              : fmt::format("{:.0f} TFLOP/s", time->gflops / 1000.0);
    std::vector<std::string> lines{
        fmt::format("about {}, at {} a rank as measured now", seconds_text(time->total()), rate),
        fmt::format("forward {}, Hessians {}, factors {}, solving {}, reading and writing {}",
                    seconds_text(time->forward), seconds_text(time->hessian), seconds_text(time->factor),
                    seconds_text(time->solve), seconds_text(time->io))};
    if (time->measuring > 0.0) {
        lines.push_back(fmt::format("before that {} for target_bits: solves with 2, 3, 4 and 8 bits",
                                    seconds_text(time->measuring)));
    }
    add_lines(text, "Time", lines);
}

// A row a group; groups that do alike share one.
void add_timeline(std::string& text, const PlannedLayers& layers) {
    std::vector<std::vector<std::string>> rows = {
        {"group", "ranks", "blocks", "stream from", "to", "solved", "written", "idle"}};
    constexpr std::size_t kShown = 10;
    for (std::size_t g = 0; g < layers.groups.size(); ++g) {
        if (layers.groups.size() > kShown && g == kShown - 1) {
            rows.push_back({"…"});
            g = layers.groups.size() - 1;
        }
        const PlannedLayerGroup& group = layers.groups[g];
        rows.push_back({std::to_string(g), spans_text(group.ranks), list_text(group.blocks),
                        seconds_text(group.begins), seconds_text(group.streamed), seconds_text(group.solved),
                        seconds_text(group.written), seconds_text(group.idle_seconds)});
    }
    text += "\nTimeline, in the last sweep\n" + table_text(rows, "rllrrrrr", 2);
}

// "0-7 · 8-15 · … · 56-63"
std::string row_groups_text(const std::vector<PlannedLayerGroup>& groups) {
    constexpr std::size_t kShown = 4;
    std::string text;
    for (std::size_t g = 0; g < groups.size(); ++g) {
        if (groups.size() > kShown && g == kShown - 1) {
            text += " · …";
            g = groups.size() - 1;
        }
        text += (g == 0 ? "" : " · ") + spans_text(groups[g].ranks);
    }
    return text;
}

void add_layers(std::string& text, const PlannedLayers& layers, bool timed) {
    if (layers.groups.empty()) return;
    const auto count = layers.groups.size();
    std::size_t ranks = 0;
    for (const auto& group : layers.groups) ranks += group.ranks.size();
    std::vector<std::string> lines;
    if (layers.propagate == "original" && layers.sweeps == 0) {
        lines.push_back(fmt::format("{} group{} of ranks take{} blocks in turn", count, count == 1 ? "" : "s",
                                    count == 1 ? "s" : ""));
    } else if (layers.propagate == "original") {
        lines.push_back(fmt::format("{} group{} of ranks hold{} ranges of blocks, {} sweep{} of the stream",
                                    count, count == 1 ? "" : "s", count == 1 ? "s" : "", layers.sweeps,
                                    layers.sweeps == 1 ? "" : "s"));
        lines.push_back(fmt::format("groups idle {:.1f}% of the stream while it fills and drains",
                                    100.0 * layers.bubble));
    } else {
        lines.push_back(fmt::format("all ranks work on the same block; {} group{} of them share{} rows{}",
                                    count, count == 1 ? "" : "s", count == 1 ? "s" : "",
                                    count == 1 ? "" : ": ranks " + row_groups_text(layers.groups)));
    }
    if (timed && ranks > 1) {
        lines.push_back(fmt::format("{:.1f} times as fast as one rank ({} against {}){}{}",
                                    layers.alone_seconds / layers.seconds, seconds_text(layers.seconds),
                                    seconds_text(layers.alone_seconds), layers.bound.empty() ? "" : "; ",
                                    layers.bound));
    }
    text += '\n';
    add_lines(text, "Groups", lines);
    if (timed && layers.propagate == "original") add_timeline(text, layers);
}

void add_list(std::string& text, const std::string& title, const std::vector<std::string>& items) {
    if (items.empty()) return;
    text += '\n' + title + '\n';
    for (const auto& item : items) text += "  - " + item + '\n';
}

}  // namespace

std::uint64_t total_memory(const PlannedRank& rank) {
    return std::accumulate(rank.memory.begin(), rank.memory.end(), std::uint64_t{0},
                           [](auto sum, const auto& item) { return sum + item.bytes; });
}

std::string to_text(const Plan& plan) {
    std::string text;
    add_lines(text, "Job", {plan.job});
    add_model(text, plan.model);
    add_quantization(text, plan.quantization, plan.model.parameters);
    add_calibration(text, plan.calibration);
    add_output(text, plan);
    add_lines(text, "Compute",
              {plan.backend, fmt::format("{} rank{}, tensors over {}", plan.ranks.size(),
                                         plan.ranks.size() == 1 ? "" : "s", plan.communicator)});
    add_placement(text, plan);
    add_memory(text, plan.ranks);
    add_files(text, plan.files);
    add_time(text, plan.time);
    add_layers(text, plan.layers, plan.time.has_value());
    add_list(text, "Warnings", plan.warnings);
    add_list(text, "This job cannot run", plan.problems);
    if (plan.problems.empty()) text += "\nNothing stands in the way: start it with quantmill run.\n";
    return text;
}

}  // namespace quantmill
