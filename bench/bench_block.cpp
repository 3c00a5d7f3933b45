// Whole blocks of named shapes through the real pipeline: writes a synthetic checkpoint, runs `quantmill run`
// on it, checks the result as `quantmill inspect` does, and prints seconds a block by stage beside what the
// plan expected and the floor.
//   bench_block --shape llama-3-70b --blocks 4 --directory /dev/shm/block --set compute.backend=cuda
//   mpirun -n 2 bench_block …                 on several GPUs
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>

#include "bench/synthetic_checkpoint.h"
#include "kernels/cpu/process_environment.h"
#include "kernels/make_backend.h"
#include "pipeline/files.h"
#include "pipeline/model_graph.h"
#include "pipeline/stopwatch.h"
#include "workers/inspect.h"
#include "workers/run_job.h"

namespace {

using namespace quantmill;
namespace fs = std::filesystem;

struct Options {
    bench::SyntheticModel model;
    fs::path directory = "build/bench-block";
    std::vector<std::string> set;
    bool csv = false;
    bool inspect = true, prepare = false;
};

struct StageFloor {
    std::string name;
    double operations;  // a block
};

// docs/algorithm.md, "What it costs"; a stage cannot be faster than its operations at the rate of a large
// product of the activation dtype.
std::vector<StageFloor> floors(const ModelGraph& graph, double tokens) {
    std::vector<StageFloor> stages{{"forward", 2.0 * tokens * static_cast<double>(graph.block_parameters())},
                                   {"hessian", 0.0},
                                   {"factor", 0.0},
                                   {"solve", 0.0}};
    for (const Stage& stage : graph.stages) {
        const auto n = static_cast<double>(stage.group.columns());
        stages[1].operations += tokens * n * n;
        stages[2].operations += n * n * n / 3.0;
        stages[3].operations += static_cast<double>(stage.group.rows()) * n * n;
    }
    return stages;
}

double measured_rate(Backend& backend, const ModelGraph& graph) {
    const Linear& linear = graph.stages.back().group.linears.front();
    const std::int64_t tokens = backend.micro_batch_tokens();
    Tensor x = backend.empty({tokens, linear.columns}, backend.activation_dtype(), "rate measurement");
    Tensor w = backend.empty({linear.rows, linear.columns}, backend.activation_dtype(), "rate measurement");
    Tensor out = backend.empty({tokens, linear.rows}, backend.activation_dtype(), "rate measurement");
    backend.zero(x);
    backend.zero(w);
    std::vector<double> seconds;
    for (int i = 0; i < 8; ++i) {
        backend.synchronize();
        const Stopwatch watch;
        backend.linear(x, w, {}, out);
        backend.synchronize();
        seconds.push_back(watch.seconds());
    }
    std::sort(seconds.begin(), seconds.end());
    return 2.0 * static_cast<double>(tokens * linear.rows * linear.columns) / seconds[seconds.size() / 2];
}

// The blocks that count: with propagate: quantized those between the first, which has nothing to overlap
// with, and the last; with original, whose groups of ranks work on different blocks, all.
struct Counted {
    int first, last;
    explicit Counted(const nlohmann::json& report, int blocks) : first(0), last(blocks) {
        if (report.at("layers").at("propagate") == "original") return;
        ++first;
        --last;
    }
    bool has(int block) const { return block >= first && block < last; }
    int count() const { return last - first; }
};

// Ranks that work on different blocks at the same time, or with original factor and solve different linears.
double at_once(const nlohmann::json& report, const std::string& stage) {
    const auto& layers = report.at("layers");
    if (layers.at("propagate") != "original") return 1.0;
    const bool solving = stage == "factor" || stage == "solve";
    return solving ? report.at("world_size").get<double>() : layers.at("groups").get<double>();
}

// Seconds of a stage a block, on the rank that took longest, over how many are worked on at once.
double stage_seconds(const nlohmann::json& report, const std::string& stage, const Counted& counted) {
    double sum = 0.0;
    std::string previous;
    for (const auto& linear : report.at("linears")) {
        const int block = linear.at("block").get<int>();
        const std::string group = fmt::format("{} {}", block, linear.at("group").get<std::string>());
        if (group == std::exchange(previous, group) || !counted.has(block)) continue;
        sum += linear.at(stage + "_seconds").get<double>();
    }
    return sum / counted.count() / at_once(report, stage);
}

double block_seconds(const nlohmann::json& report, const Counted& counted) {
    const auto& layers = report.at("layers");
    if (layers.at("propagate") == "original") return layers.at("run_seconds").get<double>() / counted.count();
    const auto seconds = report.at("block_seconds").get<std::vector<double>>();
    double sum = 0.0;
    for (int block = counted.first; block < counted.last; ++block) {
        sum += seconds[static_cast<std::size_t>(block)];
    }
    return sum / counted.count();
}

// Reading before the stream and writing after the last solve, with original.
double io_seconds(const nlohmann::json& report, const Counted& counted) {
    const auto& layers = report.at("layers");
    return (layers.at("load_seconds").get<double>() + layers.at("write_seconds").get<double>()) /
           counted.count();
}

void print_head(const Options& options, const nlohmann::json& report, double rate) {
    const auto& layers = report.at("layers");
    fmt::print(
        "\n{}: {} x {} tokens, propagate: {}, {} rank(s) in {} group(s), {}, {}\n"
        "a rank's rate {:.0f} TFLOP/s, peak memory {:.2f} GB\n{:<10}{:>12} {:>12} {:>12}\n",
        options.model.shape, options.model.sequences, options.model.length,
        layers.at("propagate").get<std::string>(), report.at("world_size").get<int>(),
        layers.at("groups").get<int>(), report.at("communicator").get<std::string>(),
        report.at("devices").at(0).get<std::string>(), rate * 1e-12,
        report.at("peak_memory").get<double>() * 1e-9, "stage", "a block", "the plan's", "floor");
}

// How a run with propagate: original divides, so that nothing is left unexplained.
void print_division(const nlohmann::json& report) {
    const auto& layers = report.at("layers");
    const auto seconds = [&](const char* name) { return layers.at(name).get<double>(); };
    const double rest = seconds("run_seconds") - seconds("load_seconds") - seconds("stream_seconds") -
                        seconds("solve_seconds") - seconds("write_seconds");
    fmt::print(
        "the run {:.2f} s in {} sweep(s) = load {:.2f} + stream {:.2f} (waited {:.2f}) + sum and solve "
        "{:.2f} + "
        "write and deliver {:.2f} + rest {:.2f}; before it, start-up and measuring {:.2f} s\n",
        seconds("run_seconds"), layers.at("sweeps").get<int>(), seconds("load_seconds"),
        seconds("stream_seconds"), seconds("waited_seconds"), seconds("solve_seconds"),
        seconds("write_seconds"), rest, report.at("seconds").get<double>() - seconds("run_seconds"));
}

// With quantized, whose reading and writing hide behind computing, the plan's last column counts computing
// and what ranks exchange; with original all.
void print(const Options& options, const nlohmann::json& report, const ModelGraph& graph, double rate) {
    const Counted counted(report, options.model.blocks);
    const double ranks = report.at("world_size").get<double>();
    const char* row =
        options.csv ? "{},{:.4f},{:.4f},{:.4f}\n" : "{:<10}{:>10.4f} s {:>10.4f} s {:>10.4f} s\n";
    if (options.csv) {
        fmt::print("stage,seconds,planned,floor\n");
    } else {
        print_head(options, report, rate);
    }
    double floor = 0.0, planned = 0.0;
    for (const StageFloor& stage : floors(graph, report.at("tokens").get<double>())) {
        const double least = stage.operations / rate / ranks;
        const double expected =
            report.at("planned_seconds").at(stage.name).get<double>() / options.model.blocks;
        floor += least;
        planned += expected;
        fmt::print(fmt::runtime(row), stage.name, stage_seconds(report, stage.name, counted), expected,
                   least);
    }
    if (report.at("layers").at("propagate") == "original") {
        const double io = report.at("planned_seconds").at("io").get<double>() / options.model.blocks;
        planned += io;
        fmt::print(fmt::runtime(row), "io", io_seconds(report, counted), io, 0.0);
    }
    const double seconds = block_seconds(report, counted);
    fmt::print(fmt::runtime(row), "block", seconds, planned, floor);
    if (options.csv) return;
    const auto& layers = report.at("layers");
    fmt::print("the plan {:+.1f}%; the whole run {:.2f} s", 100.0 * (planned / seconds - 1.0),
               report.at("seconds").get<double>());
    if (layers.at("propagate") == "original") {
        fmt::print("\n");
        print_division(report);
    } else {
        fmt::print("; blocks {:.3f} s\n",
                   fmt::join(report.at("block_seconds").get<std::vector<double>>(), " "));
    }
}

void run(const Options& options, Control& control) {
    if (control.rank() == 0) bench::write_synthetic_model(options.model, options.directory);
    control.barrier();
    const nlohmann::json job = {{"model", fs::absolute(options.directory / "model").string()},
                                {"output", {{"directory", fs::absolute(options.directory / "out").string()}}},
                                {"calibration",
                                 {{"tokens", fs::absolute(options.directory / "calibration.h5").string()},
                                  {"sequence_length", options.model.length}}},
                                {"quantization", {{"preset", "plain"}}}};
    if (control.rank() == 0) write_text(options.directory / "job.yaml", job.dump(2));  // JSON is YAML
    control.barrier();
    if (options.prepare) return;
    run_job({options.directory / "job.yaml", options.set, true}, control);
    if (control.rank() != 0) return;
    if (options.inspect) inspect_checkpoint(options.directory / "out");
    const auto report = nlohmann::json::parse(read_text(options.directory / "out/report.json"));
    const auto config = nlohmann::json::parse(read_text(options.directory / "model/config.json"));
    const auto backend = make_backend(report.at("backend").get<std::string>(), control.local_rank());
    const ModelGraph graph = build_model_graph(config, "config.json");
    print(options, report, graph, measured_rate(*backend, graph));
}

}  // namespace

int main(int argc, char** argv) {
    settle_process_environment(argv);
    Options options;
    CLI::App app("Seconds a block of named shapes, through the real pipeline");
    app.add_option("--shape", options.model.shape, "tiny, llama-3-8b, llama-3-70b or qwen2.5-72b")
        ->capture_default_str();
    app.add_option("--blocks", options.model.blocks, "at least 3: the first and the last are not counted")
        ->capture_default_str()
        ->check(CLI::Range(3, 1000));
    app.add_option("--sequences", options.model.sequences)->capture_default_str();
    app.add_option("--length", options.model.length, "tokens of a sequence")->capture_default_str();
    app.add_option("--directory", options.directory, "where model and result go; a model there is used again")
        ->capture_default_str();
    app.add_option("--set", options.set, "KEY=VALUE of the job, e.g. compute.backend=cuda");
    app.add_flag("--prepare", options.prepare, "write model, tokens and DIRECTORY/job.yaml, and run nothing");
    app.add_flag("!--no-inspect", options.inspect, "leave the result unchecked");
    app.add_flag("--csv", options.csv, "comma-separated values");
    CLI11_PARSE(app, argc, argv);
    try {
        const auto control = make_control(under_launcher());
        try {
            run(options, *control);
        } catch (const Error& error) {
            fmt::print(stderr, "{}\n", error.what());
            control->abort(error.code());
        }
        return 0;
    } catch (const Error& error) {
        fmt::print(stderr, "{}\n", error.what());
        return static_cast<int>(error.code());
    }
}
