// Simulates quantizing large models on worlds of GPUs by the plan's own cost model: the tables of
// docs/scaling.md.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "jobs/text.h"
#include "workers/forecast.h"

namespace {

using namespace quantmill;

struct ModelShape {
    const char* name;
    int blocks;
    std::int64_t hidden, inner, heads;
};
constexpr ModelShape kShapes[] = {{"70B (Llama-3-70B)", 80, 8192, 28672, 64},
                                  {"405B (Llama-3.1-405B)", 126, 16384, 53248, 128},
                                  {"dense 1T", 128, 24576, 90112, 192}};
constexpr int kPerNode = 8;

ModelGraph graph_of(const ModelShape& shape) {
    const nlohmann::json config = {{"architectures", {"LlamaForCausalLM"}},
                                   {"hidden_size", shape.hidden},
                                   {"intermediate_size", shape.inner},
                                   {"num_hidden_layers", shape.blocks},
                                   {"num_attention_heads", shape.heads},
                                   {"num_key_value_heads", 8},
                                   {"vocab_size", 128256},
                                   {"rms_norm_eps", 1e-5},
                                   {"head_dim", 128},
                                   {"rope_theta", 500000.0}};
    return build_model_graph(config, shape.name);
}

std::string cell(const Forecast& forecast) {
    return fmt::format("{} | {:.1f}", seconds_text(forecast.layers.seconds),
                       forecast.layers.alone_seconds / forecast.layers.seconds);
}

void print_table(const ModelShape& shape, std::int64_t sequences, double gigabytes) {
    const ModelGraph graph = graph_of(shape);
    PlannedWork work;
    work.graph = &graph;
    work.shards =
        plan_batch_shards(std::vector<std::int64_t>(static_cast<std::size_t>(sequences), 2048), 16384);
    work.activation = DType::bf16;
    work.stored_bytes = 2;
    const double parameters = static_cast<double>(graph.block_parameters()) * graph.blocks;
    work.read_bytes = 2.0 * parameters;
    work.written_bytes = 0.53 * parameters;
    const Rates rates = rates_of("cuda", 7e14);
    fmt::print("\n### {}, {} x 2048 tokens\n\n", shape.name, sequences);
    fmt::print("| GPUs | quantized | times | original | times | groups x GPUs | sweeps | bubble |\n");
    fmt::print("|---|---|---|---|---|---|---|---|\n");
    for (int gpus = 1; gpus <= 1024; gpus *= 2) {
        const World world = imagine_world(gpus, kPerNode, static_cast<std::uint64_t>(gigabytes * 1e9));
        const Forecast quantized =
            forecast_quantized(work, world, rates, row_groups(world, std::nullopt), true);
        fmt::print("| {} | {} | ", gpus, cell(quantized));
        try {
            const LayerPlan layers = plan_layers(work, world, rates, std::nullopt);
            const Forecast original = forecast_original(work, world, rates, layers);
            fmt::print("{} | {} x {} | {} | {:.0f}% |\n", cell(original), layers.groups.size(),
                       layers.groups.back().size(), layers.sweeps.size(), 100.0 * original.layers.bubble);
        } catch (const BadInput&) {
            fmt::print("does not fit | | | | |\n");
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    double gigabytes = 135.0;
    std::int64_t sequences = 128;
    CLI::App app("Predicted time to quantize large models on 1 to 1024 GPUs, as Markdown");
    app.add_option("--memory", gigabytes, "free memory of a GPU, GB")->capture_default_str();
    app.add_option("--sequences", sequences, "calibration sequences of 2048 tokens")->capture_default_str();
    CLI11_PARSE(app, argc, argv);
    for (const ModelShape& shape : kShapes) print_table(shape, sequences, gigabytes);
}
