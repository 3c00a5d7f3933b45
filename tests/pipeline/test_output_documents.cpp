// What surrounds the weights of an output checkpoint: their layout, the quantization config, the model card.
#include <gtest/gtest.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "pipeline/model_card.h"
#include "pipeline/output_layout.h"
#include "pipeline/quantization_config.h"
#include "tests/pipeline/capture_log.h"
#include "tests/pipeline/tiny_checkpoint.h"

namespace quantmill {
namespace {

using nlohmann::json;
using testing::TemporaryDirectory;
using testing::tiny_config;
using testing::write_tiny_checkpoint;

std::vector<StoredTensor> all_tensors(const OutputLayout& layout) {
    std::vector<StoredTensor> tensors;
    for (const OutputShard& shard : layout.shards)
        tensors.insert(tensors.end(), shard.tensors.begin(), shard.tensors.end());
    return tensors;
}

const StoredTensor* find(const std::vector<StoredTensor>& tensors, const std::string& name) {
    const auto found = std::ranges::find(tensors, name, &StoredTensor::name);
    return found == tensors.end() ? nullptr : &*found;
}

QuantizationScheme alike(const ModelGraph& graph, const QuantizationGrid& grid) {
    GptqOptions options;
    options.grid = grid;
    return {graph, options};
}

TEST(OutputLayout, ReplacesWeightsOfLinearsAndCarriesTheRest) {
    const TemporaryDirectory directory;
    const StoredTensor extra{"model.mtp.proj.weight", "F8_E4M3", {3, 5}, 0, 0};
    const ModelGraph graph = write_tiny_checkpoint(directory, tiny_config("Qwen2ForCausalLM"), {extra});
    const CheckpointReader reader(directory.path());
    const OutputLayout layout = plan_output(reader, graph, alike(graph, {4, 32, true}), 1'000'000'000);
    ASSERT_EQ(layout.shards.size(), 1U);
    EXPECT_EQ(layout.total_bytes(), layout.shards[0].bytes);
    const auto tensors = all_tensors(layout);

    std::size_t expected = 0;
    for (const auto& [name, tensor] : reader.tensors()) {
        const bool quantized = name.find("_proj.weight") != std::string::npos;
        const bool bias = name.ends_with(".bias");
        expected += quantized ? 4 : 1;
        const StoredTensor* stored = find(tensors, name);
        EXPECT_EQ(stored == nullptr, quantized) << name;
        if (quantized || stored == nullptr) continue;
        EXPECT_EQ(stored->shape, tensor.shape);
        EXPECT_EQ(stored->dtype, bias ? "F16" : tensor.dtype) << name;
        EXPECT_EQ(std::ranges::find(layout.copied, name) == layout.copied.end(), bias) << name;
    }
    EXPECT_EQ(tensors.size(), expected);
    const StoredTensor* qweight = find(tensors, "model.layers.1.mlp.down_proj.qweight");
    ASSERT_NE(qweight, nullptr);
    EXPECT_EQ(qweight->shape, (std::vector<std::int64_t>{96 * 4 / 32, 64}));
}

// Loading streams best when a block's tensors lie together: embedding, blocks by number, norm, lm_head, the
// rest.
TEST(OutputLayout, OrderOfTheFiles) {
    const TemporaryDirectory directory;
    json config = tiny_config("LlamaForCausalLM");
    config["num_hidden_layers"] = 11;
    const ModelGraph graph = write_tiny_checkpoint(directory, config, {{"aaa", "F32", {1}, 0, 0}});
    const OutputLayout layout =
        plan_output(CheckpointReader(directory.path()), graph, alike(graph, {4, 32, true}), 1000);
    const auto part = [&](const std::string& name) {
        if (name == graph.embedding) return -1;
        if (name.starts_with("model.layers.")) return std::stoi(name.substr(13));
        return name == graph.final_norm ? 100 : name == graph.lm_head ? 101 : 102;
    };
    std::vector<int> parts;
    for (const StoredTensor& tensor : all_tensors(layout)) parts.push_back(part(tensor.name));
    EXPECT_TRUE(std::ranges::is_sorted(parts));
    EXPECT_EQ(parts.front(), -1);
    EXPECT_EQ(parts.back(), 102);
    EXPECT_GT(layout.shards.size(), 20U);
}

TEST(OutputLayout, TiedHeadIsOmittedEvenIfStored) {
    const TemporaryDirectory directory;
    json config = tiny_config("LlamaForCausalLM");
    config["tie_word_embeddings"] = true;
    const ModelGraph graph =
        write_tiny_checkpoint(directory, config, {{"lm_head.weight", "BF16", {128, 64}, 0, 0}});
    const OutputLayout layout =
        plan_output(CheckpointReader(directory.path()), graph, alike(graph, {4, 32, true}), 1'000'000);
    EXPECT_EQ(find(all_tensors(layout), "lm_head.weight"), nullptr);
    EXPECT_NE(find(all_tensors(layout), graph.embedding), nullptr);
}

TEST(OutputLayout, AQuantizedHeadIsThereTiedOrNot) {
    for (const bool tied : {false, true}) {
        const TemporaryDirectory directory;
        json config = tiny_config("LlamaForCausalLM");
        config["tie_word_embeddings"] = tied;
        const ModelGraph graph = write_tiny_checkpoint(directory, config);
        QuantizationScheme scheme = alike(graph, {4, 32, true});
        GptqOptions head;
        head.grid = {8, 16, true};
        scheme.set(graph.blocks, 0, head);
        const auto tensors =
            all_tensors(plan_output(CheckpointReader(directory.path()), graph, scheme, 1'000'000));
        EXPECT_EQ(find(tensors, "lm_head.weight"), nullptr);
        EXPECT_NE(find(tensors, "model.embed_tokens.weight"), nullptr);
        const StoredTensor* scales = find(tensors, "lm_head.scales");
        ASSERT_NE(scales, nullptr);
        EXPECT_EQ(scales->shape, (std::vector<std::int64_t>{4, 128}));
        EXPECT_EQ(find(tensors, "lm_head.qweight")->shape, (std::vector<std::int64_t>{16, 128}));
    }
}

TEST(OutputLayout, GroupsLeftAsTheyAreKeepTheirWeightsAndBiases) {
    const TemporaryDirectory directory;
    const ModelGraph graph = write_tiny_checkpoint(directory, tiny_config("Qwen2ForCausalLM"));
    QuantizationScheme scheme = alike(graph, {4, 32, true});
    scheme.set(1, 0, std::nullopt);
    const OutputLayout layout = plan_output(CheckpointReader(directory.path()), graph, scheme, 1'000'000);
    const auto tensors = all_tensors(layout);
    EXPECT_NE(find(tensors, "model.layers.0.self_attn.q_proj.qweight"), nullptr);
    EXPECT_EQ(find(tensors, "model.layers.0.self_attn.q_proj.bias")->dtype, "F16");
    EXPECT_EQ(find(tensors, "model.layers.1.self_attn.q_proj.qweight"), nullptr);
    for (const std::string name : {"weight", "bias"}) {
        const std::string tensor = "model.layers.1.self_attn.q_proj." + name;
        EXPECT_EQ(find(tensors, tensor)->dtype, "BF16");
        EXPECT_NE(std::ranges::find(layout.copied, tensor), layout.copied.end());
    }
}

TEST(OutputLayout, OneGroupARowHasTheWidthOfEachLinear) {
    EXPECT_EQ(grid_for({4, -1, true}, 96).group_size, 96);
    EXPECT_EQ(grid_for({4, 128, true}, 96).group_size, 128);
    const TemporaryDirectory directory;
    const ModelGraph graph = write_tiny_checkpoint(directory, tiny_config("LlamaForCausalLM"));
    const auto tensors = all_tensors(
        plan_output(CheckpointReader(directory.path()), graph, alike(graph, {4, -1, true}), 1'000'000));
    for (const std::string name : {"self_attn.q_proj", "mlp.down_proj"}) {
        const StoredTensor* scales = find(tensors, "model.layers.0." + name + ".scales");
        ASSERT_NE(scales, nullptr);
        EXPECT_EQ(scales->shape, (std::vector<std::int64_t>{1, 64}));
    }
}

TEST(QuantizationConfig, SaysWhatLoadersRead) {
    QuantizationConfig config;
    config.bits = 3;
    config.group_size = -1;
    config.sym = false;
    config.desc_act = true;
    config.damp_percent = 0.07;
    config.damp_auto_increment = 0.02;
    config.true_sequential = false;
    config.format = GptqFormat::v2;
    config.version = "1.2.3";
    const json expected =
        json::parse(R"({"bits": 3, "group_size": -1, "desc_act": true, "sym": false, "lm_head": false,
        "quant_method": "gptq", "method": "gptq", "checkpoint_format": "gptq_v2", "format": "gptq_v2", "pack_dtype": "int32",
        "dynamic": null, "meta": {"quantizer": ["quantmill:1.2.3"], "damp_percent": 0.07, "damp_auto_increment": 0.02,
        "true_sequential": false, "act_group_aware": false, "static_groups": false, "mse": 0.0, "scale_search": "minmax",
        "signed_scales": false, "scale_rounding": "fp16"}})");
    EXPECT_EQ(json(to_json(config)), expected);
    QuantizationConfig searched = config;
    searched.static_groups = searched.signed_scales = searched.act_group_aware = true;
    searched.scale_search = "mse";
    searched.scale_rounding = "bf16";
    const json told = to_json(searched);
    EXPECT_EQ(told.at("desc_act"), false) << "g_idx stays sorted";
    EXPECT_EQ(told.at("meta").at("mse"), 2.4);
    EXPECT_EQ(told.at("meta").at("scale_search"), "mse");
    EXPECT_EQ(told.at("meta").at("scale_rounding"), "bf16");
    for (const char* key : {"act_group_aware", "static_groups", "signed_scales"}) {
        EXPECT_EQ(told.at("meta").at(key), true) << key;
    }
    QuantizationConfig propagating = config;
    propagating.error_propagation_alpha = 0.5;
    EXPECT_EQ(json(to_json(propagating)).at("meta").at("error_propagation_alpha"), 0.5);
    // What we write we read.
    const GptqScheme scheme = gptq_scheme_from(json(to_json(config)), "config.json");
    EXPECT_EQ(scheme.grid.bits, 3);
    EXPECT_EQ(scheme.grid.group_size, 0);
    EXPECT_FALSE(scheme.grid.sym);
    EXPECT_EQ(scheme.format, GptqFormat::v2);
}

TEST(QuantizationConfig, KeepsTheSourcesConfigInItsOrder) {
    const auto source = nlohmann::ordered_json::parse(R"({"zeta": 1, "alpha": [2], "model_type": "llama"})");
    const auto result = quantized_config(source, {});
    std::vector<std::string> keys;
    for (const auto& [key, value] : result.items()) keys.push_back(key);
    EXPECT_EQ(keys, (std::vector<std::string>{"zeta", "alpha", "model_type", "quantization_config"}));
    EXPECT_EQ(result.at("quantization_config"), to_json({}));
}

TEST(ModelCard, NameOfTheBaseModel) {
    EXPECT_EQ(base_model_name("/data/models/Tiny-1M"), "Tiny-1M");
    EXPECT_EQ(base_model_name("/data/models/Tiny-1M/"), "Tiny-1M");
    EXPECT_EQ(base_model_name("/data/models/x/../Tiny-1M"), "Tiny-1M");
    EXPECT_EQ(base_model_name("/cache/hub/models--org--Tiny-1M/snapshots/0123abc"), "org/Tiny-1M");
    EXPECT_EQ(base_model_name("/cache/hub/models--gpt2/snapshots/0123abc"), "gpt2")
        << "without an organisation";
}

TEST(ModelCard, NameOfALinkedBaseModel) {
    const TemporaryDirectory work;
    const auto snapshot = work / "models--org--Nice-1M/snapshots/0123abc";
    std::filesystem::create_directories(snapshot);
    std::filesystem::create_directory_symlink(snapshot, work / "mymodel");
    EXPECT_EQ(base_model_name(work / "mymodel"), "org/Nice-1M");
    EXPECT_EQ(base_model_name((work / "mymodel").string() + "/"), "org/Nice-1M");
}

TEST(ModelCard, NameOfTheBaseModelInItsDocuments) {
    const std::string commit = "0123456789abcdef0123456789abcdef01234567";
    const std::vector<std::tuple<std::string, std::string, std::string, std::string>> cases = {
        // directory, config.json, README.md, expected
        {"Nice-1M", R"({"_name_or_path": "org/Nice-1M"})", "", "org/Nice-1M"},
        {"Nice-1M", "{}", "---\nbase_model: org/Nice-1M\n---\n", "org/Nice-1M"},
        {"Nice-1M", "{}", "---\nbase_model:\n- org/Nice-1M\n---\n", "org/Nice-1M"},
        {"Nice-1M-chat", R"({"_name_or_path": "org/Nice-1M"})", "", "Nice-1M-chat"},  // trained from it
        {commit, R"({"_name_or_path": "org/Nice-1M"})", "", "org/Nice-1M"},
        {commit, R"({"_name_or_path": "/home/me/Nice-1M"})", "---\nbase_model: org/Base\n---\n", "org/Base"},
        {commit, R"({"_name_or_path": "../Nice-1M"})", "", commit},
        {"Nice-1M", R"({"_name_or_path": "./Nice-1M"})", "", "Nice-1M"},
        {"Nice-1M", R"({"_name_or_path": 5})", "---\nbase_model: [a/Nice-1M, b/Nice-1M]\n---\n", "Nice-1M"},
        {"Nice-1M", "no JSON", "", "Nice-1M"},
    };
    for (const auto& [name, config, card, expected] : cases) {
        SCOPED_TRACE(name + " " + config + " " + card);
        const TemporaryDirectory work;
        work.write(name + "/config.json", config);
        work.write(name + "/README.md", card);
        EXPECT_EQ(base_model_name(work / name), expected);
    }
}

const ModelCard kCard{"org/Tiny: 1M",  "Tiny, 4-bit GPTQ",     "1.2.3",
                      {{"bits", "4"}}, {{"sequences", "128"}}, {{"linear", "loss"}, {"q_proj", "0.5"}}};

YAML::Node front_matter(const std::string& text) {
    EXPECT_TRUE(text.starts_with("---\n"));
    return YAML::Load(text.substr(4, text.find("\n---\n", 4) - 3));
}

TEST(ModelCard, FrontMatterAndTables) {
    const TemporaryDirectory source;
    const std::string text = to_markdown(kCard, source.path());
    const YAML::Node head = front_matter(text);
    EXPECT_EQ(head["base_model"].as<std::string>(), "org/Tiny: 1M");  // a colon must be quoted
    EXPECT_EQ(head["base_model_relation"].as<std::string>(), "quantized");
    EXPECT_EQ(head["quantized_by"].as<std::string>(), "quantmill");
    EXPECT_EQ(head["library_name"].as<std::string>(), "transformers");
    EXPECT_EQ(head["pipeline_tag"].as<std::string>(), "text-generation");
    EXPECT_FALSE(head["license"]);
    for (const std::string part :
         {"\n# Tiny, 4-bit GPTQ\n", "quantmill 1.2.3", "| bits | 4 |", "| sequences | 128 |",
          "| linear | loss |\n| --- | --- |\n| q_proj | 0.5 |"}) {
        EXPECT_NE(text.find(part), std::string::npos) << part;
    }
    EXPECT_EQ(text.find(source.path().string()), std::string::npos);
}

TEST(ModelCard, TakesTheLicenseOver) {
    const TemporaryDirectory source;
    source.write("README.md",
                 "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.org/l\nlanguage:\n- "
                 "en\n- fr\n"
                 "pipeline_tag: image-text-to-text\nbase_model: someone/else\n---\n# Old\n");
    const YAML::Node head = front_matter(to_markdown(kCard, source.path()));
    EXPECT_EQ(head["license"].as<std::string>(), "other");
    EXPECT_EQ(head["license_name"].as<std::string>(), "tiny");
    EXPECT_EQ(head["license_link"].as<std::string>(), "https://example.org/l");
    EXPECT_EQ(head["language"].as<std::vector<std::string>>(), (std::vector<std::string>{"en", "fr"}));
    EXPECT_EQ(head["pipeline_tag"].as<std::string>(), "image-text-to-text");
    EXPECT_EQ(head["base_model"].as<std::string>(), "org/Tiny: 1M");
}

TEST(ModelCard, SurvivesACardWithoutUsableFrontMatter) {
    for (const std::string card : {"# No front matter\n", "---\nlicense: [broken\n---\n",
                                   "---\nonly opened\n", "---\n- a list\n---\n"}) {
        const testing::CaptureLog log;
        const TemporaryDirectory source;
        source.write("README.md", card);
        EXPECT_EQ(front_matter(to_markdown(kCard, source.path()))["quantized_by"].as<std::string>(),
                  "quantmill")
            << card;
        EXPECT_EQ(log.text().empty(), card.find("broken") == std::string::npos) << log.text();
    }
}

}  // namespace
}  // namespace quantmill
