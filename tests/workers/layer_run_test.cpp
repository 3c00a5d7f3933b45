// Jobs on random models and tokens, placed at random over the ranks of this program: all write the bytes that
// one process writes.
#include "workers/layer_run.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <cstring>

#include "kernels/make_backend.h"
#include "tests/mpi_main.h"
#include "tests/workers/random_model.h"
#include "workers/execute_job.h"
#include "workers/job_report.h"
#include "workers/job_scheme.h"
#include "workers/layer_planner.h"

namespace quantmill {
namespace {

namespace fs = std::filesystem;
using Random = std::mt19937_64;
using testing::TemporaryDirectory;

template <class T>
T one_of(Random& random, std::initializer_list<T> values) {
    return values.begin()[random() % values.size()];
}

int between(Random& random, int low, int high) {
    return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
}

nlohmann::json random_config(Random& random) {
    const auto family = one_of<const char*>(random, {"Llama", "Mistral", "Qwen2", "Qwen3"});
    nlohmann::json config = testing::tiny_config(fmt::format("{}ForCausalLM", family));
    config["num_hidden_layers"] = between(random, 1, 6);
    config["hidden_size"] = one_of(random, {32, 64, 96});
    config["intermediate_size"] = one_of(random, {32, 96, 160});
    config["tie_word_embeddings"] = random() % 2 == 0;
    return config;
}

QuantizationSpec random_quantization(Random& random) {
    QuantizationSpec spec;
    spec.bits = one_of(random, {2, 3, 4, 8});
    spec.group_size = one_of<std::int64_t>(random, {-1, 16, 32});
    spec.desc_act = random() % 2 == 0;
    spec.act_group_aware = !spec.desc_act && random() % 2 == 0;
    spec.scale_search = one_of<const char*>(random, {"minmax", "hessian"});
    spec.signed_scales = random() % 2 == 0;
    spec.damp_percent = one_of(random, {0.01, 0.05});
    spec.true_sequential = random() % 2 == 0;
    if (random() % 3 == 0) spec.lm_head_bits = one_of(random, {4, 8});
    return spec;
}

// Leaves some groups as they are, and gives others bits of their own, as rules of a job would.
void vary(Random& random, const ModelGraph& graph, QuantizationScheme& scheme) {
    for (int block = 0; block < graph.blocks; ++block) {
        for (std::size_t stage = 0; stage < graph.stages.size(); ++stage) {
            GptqOptions options = scheme.usual();
            options.grid.bits = one_of(random, {2, 3, 4, 8});
            if (random() % 4 == 0) scheme.set(block, stage, options);
            if (random() % 6 == 0) scheme.set(block, stage, std::nullopt);
        }
    }
}

// Blocks that Hessians pass, lm_head among them.
int streamed_blocks(const PreparedJob& job) { return job.graph.blocks + (job.head ? 1 : 0); }

std::size_t quantized_linears(const PreparedJob& job) {
    std::size_t count = 0;
    for_each_quantized(job.graph, job.scheme,
                       [&](int, std::size_t, const LinearGroup& group, const GptqOptions&) {
                           count += group.linears.size();
                       });
    return count;
}

// Any groups of the ranks, and any ranges of blocks in any number of sweeps, also empty ones.
LayerPlan random_layers(Random& random, int ranks, int blocks) {
    std::vector<std::string> hosts;
    for (int rank = 0; rank < ranks; ++rank) hosts.push_back(fmt::format("host{}", random() % 3));
    LayerPlan plan;
    plan.groups = form_groups(hosts, between(random, 1, ranks));
    const auto parts = plan.groups.size() * static_cast<std::size_t>(between(random, 1, 3));
    std::vector<int> cuts{0, blocks};
    while (cuts.size() < parts + 1) cuts.push_back(between(random, 0, blocks));
    std::sort(cuts.begin(), cuts.end());
    for (std::size_t i = 0; i < parts; ++i) {
        if (i % plan.groups.size() == 0) plan.sweeps.emplace_back();
        plan.sweeps.back().push_back({cuts[i], cuts[i + 1]});
    }
    return plan;
}

std::string describe(const LayerPlan& plan) {
    std::string text = fmt::format("groups {};", plan.groups);
    for (const auto& sweep : plan.sweeps) {
        text += " sweep";
        for (const BlockRange& range : sweep) text += fmt::format(" {}-{}", range.begin, range.end);
    }
    return text;
}

class LayerRunTest : public ::testing::Test {
protected:
    LayerRunTest() : backend_(make_backend("cpu", 0)), random_(test_seed()) {
        if (control_.rank() == 0) directory_ = std::make_unique<TemporaryDirectory>();
        root_ = control_.broadcast(directory_ ? directory_->path().string() : "", 0);
    }
    ~LayerRunTest() override { control_.barrier(); }

    // A random job with a checkpoint for each of `outputs` quantizations, prepared by all ranks.
    std::vector<PreparedJob> random_jobs(int number, const std::string& propagate, int outputs) {
        JobSpec spec;
        spec.model = root_ / fmt::format("model{}", number);
        const nlohmann::json config = random_config(random_);
        Random weights(random_());
        if (control_.rank() == 0) testing::write_random_checkpoint(spec.model, config, weights);
        control_.barrier();
        CheckpointReader reader(spec.model);
        ModelGraph graph = build_model_graph(config, "config.json");
        CalibrationStore store;
        for (int s = between(random_, 1, 20); s > 0; --s) {
            std::vector<std::int32_t>& ids = store.sequences.emplace_back();
            for (int t = between(random_, 1, 40); t > 0; --t) ids.push_back(between(random_, 0, 127));
        }
        auto shards = plan_batch_shards(lengths_of(store.sequences), between(random_, 1, 120));
        std::vector<PreparedJob> jobs;
        for (int o = 0; o < outputs; ++o) {
            spec.quantization = random_quantization(random_);
            spec.quantization.propagate = propagate;
            spec.output.max_shard_size = one_of<std::uint64_t>(random_, {8'000, 40'000, 5'000'000'000});
            QuantizationScheme scheme = scheme_of_job(spec, graph, true);
            if (random_() % 2 == 0) vary(random_, graph, scheme);
            OutputLayout layout = plan_output(reader, graph, scheme, spec.output.max_shard_size);
            const bool head = scheme.quantizes_head();
            jobs.push_back({spec, reader, graph, store, shards, std::move(scheme), std::move(layout), head});
        }
        const bool head = std::ranges::any_of(jobs, [](const PreparedJob& job) { return job.head; });
        for (PreparedJob& job : jobs) job.head = head;
        return jobs;
    }

    // Runs the jobs on these ranks into directories below `name`.
    void run(std::vector<PreparedJob> jobs, const std::string& name, Control& control,
             const LayerPlan& layers) {
        std::vector<Report> reports;
        for (std::size_t o = 0; o < jobs.size(); ++o) {
            jobs[o].spec.output.directory = root_ / name / std::to_string(o);
            if (control.rank() == 0) fs::create_directories(jobs[o].spec.output.directory);
            reports.push_back(begin_report(jobs[o], control, *backend_, "mpi"));
        }
        control.barrier();
        Coordinator coordinator(control, 60.0, false);
        execute_job(jobs, layers, control, *backend_, coordinator, {}, reports);
        coordinator.finish();
        if (control.rank() != 0) return;
        for (std::size_t o = 0; o < jobs.size(); ++o) {
            EXPECT_EQ(reports[o].linears.size(), quantized_linears(jobs[o]));
        }
    }

    std::map<std::string, std::string> files(const std::string& name) const {
        std::map<std::string, std::string> found;
        for (const auto& entry : fs::recursive_directory_iterator(root_ / name)) {
            const fs::path file = fs::relative(entry.path(), root_ / name);
            const std::string extension = file.extension().string();
            if (extension != ".safetensors" && file.filename() != "model.safetensors.index.json") continue;
            found[file.string()] = testing::contents(entry.path());
        }
        return found;
    }

    void expect_same(const std::string& name, const std::string& expected, const std::string& what) const {
        if (control_.rank() != 0) return;
        const auto wanted = files(expected);
        EXPECT_GE(wanted.size(), 2U);
        EXPECT_TRUE(files(name) == wanted) << "QUANTMILL_TEST_SEED=" << test_seed() << ": " << what;
    }

    // One process, all blocks in one sweep.
    void run_alone(const std::vector<PreparedJob>& jobs, const std::string& name) {
        if (control_.rank() != 0) return;
        const auto alone = make_lone_control();
        run(jobs, name, *alone, {{{0}}, {{{0, streamed_blocks(jobs[0])}}}});
    }

    Control& control_ = test_control();
    std::unique_ptr<Backend> backend_;
    Random random_;  // the same numbers on every rank
    std::unique_ptr<TemporaryDirectory> directory_;
    fs::path root_;
};

constexpr int kRounds = 30;  // a program start; four of them make more than a hundred jobs

TEST_F(LayerRunTest, AnyPlacementWritesTheBytesOfOneProcess) {
    for (int round = 0; round < kRounds; ++round) {
        const std::string propagate = round % 3 == 2 ? "quantized" : "original";
        const auto jobs = random_jobs(round, propagate, 1);
        const LayerPlan layers = random_layers(random_, control_.size(), streamed_blocks(jobs[0]));
        const std::string what =
            fmt::format("round {}, {}, {} sequences, {} blocks, {}", round, propagate,
                        jobs[0].calibration.sequences.size(), jobs[0].graph.blocks, describe(layers));
        run_alone(jobs, fmt::format("alone{}", round));
        run(jobs, fmt::format("spread{}", round), control_, layers);
        expect_same(fmt::format("spread{}", round), fmt::format("alone{}", round), what);
        if (::testing::Test::HasFailure()) return;
    }
}

TEST_F(LayerRunTest, EachOfManyOutputsIsThatOfAJobOfItsOwn) {
    for (int round = 0; round < 3; ++round) {
        const auto jobs = random_jobs(round, "original", 3);
        const LayerPlan layers = random_layers(random_, control_.size(), streamed_blocks(jobs[0]));
        run(jobs, fmt::format("together{}", round), control_, layers);
        for (std::size_t o = 0; o < jobs.size(); ++o) {
            const std::string alone = fmt::format("alone{}-{}", round, o);
            run_alone({jobs[o]}, alone);
            if (control_.rank() == 0) {
                EXPECT_TRUE(files(alone + "/0") == files(fmt::format("together{}/{}", round, o)))
                    << "QUANTMILL_TEST_SEED=" << test_seed() << ": output " << o << ", " << describe(layers);
            }
        }
    }
}

// Written by one placement, read by another: the bytes are those of a run with the model.
TEST_F(LayerRunTest, StoredHessiansGiveTheSameBytes) {
    for (int round = 0; round < 3; ++round) {
        auto jobs = random_jobs(round, "original", 2);
        const int blocks = streamed_blocks(jobs[0]);
        const LayerPlan layers = random_layers(random_, control_.size(), blocks);
        const fs::path store = root_ / fmt::format("hessians{}", round);
        for (PreparedJob& job : jobs) job.spec.calibration.save_hessians = store;
        require_hessian_stores(jobs[0], control_);
        run(jobs, fmt::format("saving{}", round), control_, layers);
        for (PreparedJob& job : jobs) {
            job.spec.calibration.save_hessians.clear();
            job.spec.calibration.hessians = store;
        }
        require_hessian_stores(jobs[0], control_);
        const std::vector<std::string> hosts(static_cast<std::size_t>(control_.size()), "host");
        run(jobs, fmt::format("reading{}", round), control_, plan_without_stream(hosts, blocks));
        for (PreparedJob& job : jobs) job.spec.calibration.hessians.clear();
        run_alone(jobs, fmt::format("alone{}", round));
        expect_same(fmt::format("saving{}", round), fmt::format("alone{}", round), describe(layers));
        expect_same(fmt::format("reading{}", round), fmt::format("alone{}", round), describe(layers));
    }
}

}  // namespace
}  // namespace quantmill
