#include "workers/forecast.h"

#include <algorithm>
#include <numeric>

#include "jobs/text.h"
#include "workers/calibration_batches.h"
#include "workers/placement.h"

namespace quantmill {
namespace {

// Seconds of one block when all ranks work on it.
struct BlockTime {
    double forward = 0.0, hessian = 0.0, factor = 0.0, solve = 0.0;
    double sums = 0.0, factors_sent = 0.0, rows_sent = 0.0;  // between ranks
    double network() const { return sums + factors_sent + rows_sent; }
    double total() const { return forward + hessian + factor + solve + network(); }
};

double busiest_tokens(const PlannedWork& work, int ranks) {
    double busiest = 0.0;
    for (int rank = 0; rank < ranks; ++rank) {
        const RowRange own = shards_of_rank(static_cast<std::int64_t>(work.shards.size()), rank, ranks);
        double tokens = 0.0;
        for (std::int64_t s = own.begin; s < own.end; ++s) {
            tokens += static_cast<double>(work.shards[static_cast<std::size_t>(s)].tokens());
        }
        busiest = std::max(busiest, tokens);
    }
    return busiest;
}

// Hessians are summed over all ranks in a ring, factors spread from one, codes gathered from `row_ranks`.
void exchange(const ModelGraph& graph, double ranks, double row_ranks, bool error_propagation,
              double bytes_per_second, BlockTime& time) {
    for (const Stage& stage : graph.stages) {
        const auto n = static_cast<double>(stage.group.columns());
        const auto rows = static_cast<double>(stage.group.rows());
        time.sums += 2.0 * (ranks - 1.0) / ranks * n * (n + 1.0) / 2.0 * 8.0 / bytes_per_second;
        time.factors_sent += n * n * 4.0 / bytes_per_second;
        time.rows_sent += (row_ranks - 1.0) / row_ranks * rows * n / bytes_per_second;
        if (error_propagation) time.sums += 2.0 * (ranks - 1.0) / ranks * n * n * 8.0 / bytes_per_second;
    }
}

BlockTime block_time(const PlannedWork& work, const World& world, const Rates& rates, int row_ranks,
                     bool true_sequential) {
    const bool error_propagation = work.options.error_propagation_alpha > 0.0;
    const int ranks = world.size();
    const double tokens = busiest_tokens(work, ranks);
    const auto length = static_cast<double>(limits_of(work.shards).length);
    BlockTime time;
    std::vector<double> factors;
    const double passes = (true_sequential ? 1.0 : 2.0) + (error_propagation ? 1.0 : 0.0);
    for (const StageWork& stage : stage_work(work.graph->stages, work.graph->attention, length)) {
        time.forward += passes * tokens * rates.forward_seconds(stage);
        time.hessian +=
            (error_propagation ? kPropagatedHessian : 1.0) * tokens * stage.hessian / rates.hessian;
        factors.push_back(rates.factor_seconds(stage));
        time.solve += solve_work(stage, work.options, rates) / rates.solve / row_ranks;
    }
    time.factor = std::accumulate(factors.begin(), factors.end(), 0.0);
    if (!true_sequential) {
        const std::vector<int> owners = longest_first(factors, ranks);
        std::vector<double> load(static_cast<std::size_t>(ranks), 0.0);
        for (std::size_t s = 0; s < factors.size(); ++s)
            load[static_cast<std::size_t>(owners[s])] += factors[s];
        time.factor = *std::max_element(load.begin(), load.end());
    }
    if (ranks > 1) {
        const double bytes_per_second = world.host_count() > 1 ? rates.network : rates.link;
        exchange(*work.graph, ranks, row_ranks, error_propagation, bytes_per_second, time);
    }
    return time;
}

std::vector<std::string> blocks_of(const LayerPlan& plan, std::size_t group, int count) {
    std::vector<std::string> spans;
    for (const auto& sweep : plan.sweeps) {
        const BlockRange range = sweep[group];
        const bool head = !range.empty() && range.end > count;
        std::vector<std::int64_t> blocks(static_cast<std::size_t>(range.count() - (head ? 1 : 0)));
        std::iota(blocks.begin(), blocks.end(), range.begin);
        std::string span = blocks.empty() && head ? "" : spans_text(blocks);
        if (head) span += span.empty() ? "lm_head" : ",lm_head";
        spans.push_back(std::move(span));
    }
    return spans;
}

std::string share_text(double part, double whole) { return fmt::format("{:.0f}%", 100.0 * part / whole); }

}  // namespace

Forecast forecast_quantized(const PlannedWork& work, const World& world, const Rates& rates,
                            const LayerPlan& layers, bool true_sequential) {
    const double blocks = work.graph->blocks;
    const auto row_ranks = static_cast<int>(layers.groups.front().size());
    const BlockTime block = block_time(work, world, rates, row_ranks, true_sequential);
    const World one = imagine_world(1, 1, 0);
    const BlockTime alone = block_time(work, one, rates, 1, true_sequential);
    // Reading and writing hide behind computing as far as that lasts; the first block and the output's tail
    // do not.
    const auto io_seconds = [&](double computing, int hosts) {
        const double disk = (work.read_bytes + work.written_bytes) / (rates.disk * hosts);
        return disk / blocks + std::max(0.0, disk - computing);
    };

    Forecast forecast;
    forecast.time = {blocks * block.forward,
                     blocks * (block.hessian + block.sums),
                     blocks * (block.factor + block.factors_sent),
                     blocks * (block.solve + block.rows_sent),
                     io_seconds(blocks * block.total(), world.host_count()),
                     0.0};
    PlannedLayers& planned = forecast.layers;
    planned.propagate = "quantized";
    planned.seconds = forecast.time.total();
    planned.alone_seconds = blocks * alone.total() + io_seconds(blocks * alone.total(), 1);
    for (const auto& group : layers.groups) planned.groups.push_back({{group.begin(), group.end()}, {}});
    if (world.size() > 1) {
        const double most = alone.total() / alone.factor;
        planned.bound = fmt::format(
            "of a block's {}, {} are factors that one rank computes ({}) and {} go between ranks: whatever "
            "their "
            "number, at most {:.1f} times",
            seconds_text(block.total()), seconds_text(block.factor), share_text(block.factor, block.total()),
            seconds_text(block.network()), most);
    }
    return forecast;
}

Forecast forecast_original(const PlannedWork& work, const World& world, const Rates& rates,
                           const LayerPlan& layers) {
    const std::vector<GroupTimeline> lines = simulate(work, world, rates, layers);
    Forecast forecast;
    PlannedLayers& planned = forecast.layers;
    planned.propagate = "original";
    planned.sweeps = layers.streams ? static_cast<std::int64_t>(layers.sweeps.size()) : 0;
    if (layers.streams) {  // what has passed comes back for the next sweep, so that it fills and drains once
        const double items = items_in_stream(work, layers) * static_cast<double>(layers.sweeps.size());
        planned.bubble = bubble_fraction(static_cast<int>(layers.groups.size()), items);
    }
    planned.seconds = total_seconds(lines);
    const LayerPlan alone{{{0}}, {{{0, work.graph->blocks}}}, layers.streams};
    planned.alone_seconds = total_seconds(simulate(work, imagine_world(1, 1, 0), rates, alone));
    std::size_t last = 0;
    for (std::size_t g = 0; g < lines.size(); ++g) {
        const GroupTimeline& line = lines[g];
        std::vector<std::int64_t> ranks(layers.groups[g].begin(), layers.groups[g].end());
        planned.groups.push_back({std::move(ranks), blocks_of(layers, g, work.graph->blocks), line.first_item,
                                  line.streamed, line.solved, line.written, line.stream_seconds,
                                  line.reduce_seconds, line.solve_seconds, line.idle_seconds});
        if (line.written > lines[last].written) last = g;
    }
    const GroupTimeline& slowest = lines[last];
    const double rest = slowest.written - slowest.stream_seconds - slowest.reduce_seconds -
                        slowest.solve_seconds - slowest.idle_seconds;
    if (world.size() > 1) {
        planned.bound = fmt::format(
            "its last group streams {}, idles {}, sums Hessians {}, solves {}, reads and writes {}",
            share_text(slowest.stream_seconds, slowest.written),
            share_text(slowest.idle_seconds, slowest.written),
            share_text(slowest.reduce_seconds, slowest.written),
            share_text(slowest.solve_seconds, slowest.written), share_text(rest, slowest.written));
    }
    const BlockCost one = block_cost(work, rates, 1.0);
    double hessian = 0.0;
    for (const StageWork& stage : stage_work(work.graph->stages, work.graph->attention, 0.0)) {
        hessian += stage.hessian / rates.hessian;
    }
    const double hessian_share = hessian / one.stream;
    const double factors = work.factors * one.factors();
    const double factor_share = factors / (factors + work.solves * one.solves());
    forecast.time = {slowest.stream_seconds * (1.0 - hessian_share) + slowest.idle_seconds,
                     slowest.stream_seconds * hessian_share + slowest.reduce_seconds,
                     slowest.solve_seconds * factor_share,
                     slowest.solve_seconds * (1.0 - factor_share),
                     rest,
                     0.0};
    return forecast;
}

Forecast forecast(const PreparedJob& job, const PlannedWork& work, const World& world, const Rates& rates,
                  const LayerPlan& layers) {
    const QuantizationSpec& spec = job.spec.quantization;
    if (spec.propagate == "original") return forecast_original(work, world, rates, layers);
    return forecast_quantized(work, world, rates, layers, spec.true_sequential);
}

}  // namespace quantmill
