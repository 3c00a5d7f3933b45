#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "pipeline/model_config.h"
#include "pipeline/model_graph.h"
#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/tiny_checkpoint.h"

namespace quantmill {
namespace {

using nlohmann::json;
using testing::expect_error;
using testing::tiny_config;

ModelGraph build(const std::string& architecture, const json& changes = json::object()) {
    json config = tiny_config(architecture);
    config.update(changes);
    return build_model_graph(config, "model/config.json");
}

const Linear& linear_of(const ModelGraph& graph, const std::string& name) {
    for (const Stage& stage : graph.stages) {
        for (const Linear& linear : stage.group.linears) {
            if (linear.name == name) return linear;
        }
    }
    throw std::runtime_error("no linear " + name);
}

std::vector<std::string> biased(const ModelGraph& graph) {
    std::vector<std::string> names;
    for (const Stage& stage : graph.stages) {
        for (const Linear& linear : stage.group.linears) {
            if (linear.bias) names.push_back(linear.name.substr(linear.name.find('.') + 1));
        }
    }
    return names;
}

using Names = std::vector<std::string>;
const Names kQkv{"q_proj", "k_proj", "v_proj"}, kAttention{"q_proj", "k_proj", "v_proj", "o_proj"};

TEST(ModelGraph, StagesOfADenseDecoder) {
    const ModelGraph graph =
        build("LlamaForCausalLM", {{"hidden_size", 128}});  // wider than its heads together
    EXPECT_EQ(graph.family, "llama");
    EXPECT_EQ(graph.architecture, "LlamaForCausalLM");
    EXPECT_EQ(graph.blocks, 2);
    EXPECT_FLOAT_EQ(graph.norm_eps, 1e-5F);
    ASSERT_EQ(graph.stages.size(), 4U);

    const std::vector<std::tuple<std::string, StageInput, std::string, bool, std::int64_t, std::int64_t>>
        expected = {
            {"qkv", StageInput::norm, "input_layernorm.weight", false, 64 + 32 + 32, 128},
            {"o", StageInput::attention, "", true, 128, 64},
            {"gate_up", StageInput::norm, "post_attention_layernorm.weight", false, 96 + 96, 128},
            {"down", StageInput::silu_mul, "", true, 128, 96},
        };
    for (std::size_t s = 0; s < 4; ++s) {
        const Stage& stage = graph.stages[s];
        EXPECT_EQ(std::tuple(stage.group.name, stage.input, stage.norm, stage.residual, stage.group.rows(),
                             stage.group.columns()),
                  expected[s]);
        for (const Linear& linear : stage.group.linears)
            EXPECT_EQ(linear.columns, stage.group.columns()) << "one shared input";
    }
    EXPECT_EQ(graph.block_parameters(), 128 * 128 + 128 * 64 + 192 * 128 + 128 * 96);
    EXPECT_EQ(graph.in_block(1, "mlp.up_proj"), "model.layers.1.mlp.up_proj");
    EXPECT_EQ(linear_of(graph, "self_attn.k_proj").rows, 32);
}

TEST(ModelGraph, WhatDistinguishesTheFamilies) {
    EXPECT_EQ(biased(build("LlamaForCausalLM")), Names{});
    EXPECT_EQ(biased(build("LlamaForCausalLM", {{"attention_bias", true}})), kAttention);
    EXPECT_EQ(biased(build("LlamaForCausalLM", {{"mlp_bias", true}})),
              (Names{"gate_proj", "up_proj", "down_proj"}));
    EXPECT_EQ(biased(build("MistralForCausalLM")), Names{});
    EXPECT_EQ(biased(build("Qwen2ForCausalLM")), kQkv) << "without a field that says so";
    EXPECT_EQ(biased(build("Qwen3ForCausalLM")), Names{});
    EXPECT_EQ(biased(build("Qwen3ForCausalLM", {{"attention_bias", true}})), kAttention);

    EXPECT_EQ(build("MistralForCausalLM", {{"sliding_window", 4096}}).attention.window, 4096);
    EXPECT_EQ(build("MistralForCausalLM", {{"sliding_window", nullptr}}).attention.window, 0);
    EXPECT_EQ(
        build("Qwen2ForCausalLM", {{"sliding_window", 4096}, {"use_sliding_window", false}}).attention.window,
        0);

    const auto norms = build("Qwen3ForCausalLM").norms();
    EXPECT_EQ(norms.size(), 4U);
    EXPECT_EQ(norms.at(2), (std::pair<std::string, std::int64_t>{"self_attn.q_norm.weight", 32}));
    EXPECT_EQ(norms.at(3), (std::pair<std::string, std::int64_t>{"self_attn.k_norm.weight", 32}));
    EXPECT_EQ(build("Qwen2ForCausalLM").norms().size(), 2U);
}

TEST(ModelGraph, DefaultsOfAbsentFields) {
    json config = tiny_config("LlamaForCausalLM");
    config.erase("head_dim");
    config.erase("num_key_value_heads");
    const ModelGraph llama = build_model_graph(config, "config.json");
    EXPECT_EQ(llama.attention.head_dim, 32) << "hidden_size / heads";
    EXPECT_EQ(llama.attention.kv_heads, 2) << "as many as heads";
    EXPECT_EQ(llama.lm_head, "lm_head.weight");
    config["architectures"] = {"Qwen3ForCausalLM"};
    EXPECT_EQ(build_model_graph(config, "config.json").attention.head_dim, 128) << "the family's own default";
    const ModelGraph tied = build("LlamaForCausalLM", {{"tie_word_embeddings", true}});
    EXPECT_EQ(tied.lm_head, tied.embedding);
}

TEST(ModelGraph, RotaryFrequencies) {
    const ModelGraph plain = build("LlamaForCausalLM", {{"rope_theta", 500000.0}});
    ASSERT_EQ(plain.inverse_frequencies.size(), 16U);
    for (std::size_t i = 0; i < 16; ++i) {
        EXPECT_NEAR(plain.inverse_frequencies[i], std::pow(500000.0, -2.0 * static_cast<double>(i) / 32),
                    1e-6 * plain.inverse_frequencies[i]);
    }
    // As transformers 5 writes it; the same numbers.
    const json parameters{{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500000.0}}},
                          {"rope_theta", nullptr}};
    EXPECT_EQ(build("LlamaForCausalLM", parameters).inverse_frequencies, plain.inverse_frequencies);
    const ModelGraph linear =
        build("LlamaForCausalLM",
              {{"rope_theta", 500000.0}, {"rope_scaling", {{"type", "linear"}, {"factor", 4.0}}}});
    for (std::size_t i = 0; i < 16; ++i)
        EXPECT_FLOAT_EQ(linear.inverse_frequencies[i], plain.inverse_frequencies[i] / 4);
}

TEST(ModelGraph, RotaryScalingOfLlama3) {
    const double factor = 8.0, low = 1.0, high = 4.0, original = 64.0;
    const json scaling{{"rope_type", "llama3"},
                       {"factor", factor},
                       {"low_freq_factor", low},
                       {"high_freq_factor", high},
                       {"original_max_position_embeddings", 64}};
    const ModelGraph plain = build("LlamaForCausalLM"),
                     scaled = build("LlamaForCausalLM", {{"rope_scaling", scaling}});
    int kept = 0, divided = 0, between = 0;
    for (std::size_t i = 0; i < 16; ++i) {
        const double frequency = plain.inverse_frequencies[i];
        const double turns = original * frequency / (2 * std::numbers::pi);  // within the original context
        double expected = frequency;
        if (turns > high) {
            ++kept;
        } else if (turns < low) {
            expected = frequency / factor;
            ++divided;
        } else {
            const double smooth = (turns - low) / (high - low);
            expected = (1 - smooth) * frequency / factor + smooth * frequency;
            ++between;
        }
        EXPECT_NEAR(scaled.inverse_frequencies[i], expected, 2e-6 * expected) << i;
    }
    EXPECT_TRUE(kept > 0 && divided > 0 && between > 0) << "the test must see all three ranges";
}

TEST(ModelGraph, RefusesWhatItDoesNotImplement) {
    const std::string file = "model/config.json";
    const std::vector<std::tuple<std::string, json, std::vector<std::string>>> cases = {
        {"Gemma2ForCausalLM",
         {},
         {file, "Gemma2ForCausalLM",
          "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"}},
        {"LlamaForCausalLM", {{"architectures", nullptr}}, {file, "architectures"}},
        {"LlamaForCausalLM", {{"architectures", {"LlamaForCausalLM", "Other"}}}, {file, "architectures"}},
        {"LlamaForCausalLM", {{"hidden_act", "gelu"}}, {file, "gelu", "silu"}},
        {"LlamaForCausalLM", {{"hidden_size", nullptr}}, {file, "hidden_size", "missing"}},
        {"LlamaForCausalLM", {{"hidden_size", "64"}}, {file, "hidden_size", "positive integer"}},
        {"LlamaForCausalLM", {{"hidden_size", -64}}, {file, "hidden_size", "-64"}},
        {"LlamaForCausalLM",
         {{"num_attention_heads", 3}, {"num_key_value_heads", 2}},
         {file, "3 heads", "2 key/value heads"}},
        {"LlamaForCausalLM",
         {{"rope_scaling", {{"rope_type", "yarn"}}}},
         {file, "yarn", "default, linear, llama3"}},
        {"LlamaForCausalLM",
         {{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}}},
         {file, "original_max_position_embeddings"}},
        {"LlamaForCausalLM", {{"partial_rotary_factor", 0.5}}, {file, "partial_rotary_factor"}},
        {"LlamaForCausalLM", {{"attention_bias", "yes"}}, {file, "attention_bias", "true or false"}},
        {"LlamaForCausalLM", {{"attention_multiplier", 0.1}}, {file, "attention_multiplier", "0.1"}},
        {"LlamaForCausalLM", {{"final_logit_softcapping", 30.0}}, {file, "final_logit_softcapping"}},
        {"LlamaForCausalLM", {{"num_local_experts", 4}}, {file, "num_local_experts"}},
        {"LlamaForCausalLM", {{"no_rope_layers", {1, 0}}}, {file, "no_rope_layers"}},
        {"LlamaForCausalLM", {{"sliding_window", 100}}, {file, "sliding_window"}},
        {"LlamaForCausalLM",
         {{"rope_scaling", {{"type", "default"}, {"mrope_section", {8, 8}}}}},
         {file, "mrope_section"}},
        {"LlamaForCausalLM",
         {{"model_type", "gemma"}},
         {file, "model_type", "gemma", "LlamaForCausalLM", "llama"}},
        {"Qwen2ForCausalLM", {{"use_sliding_window", true}}, {file, "use_sliding_window"}},
        {"Qwen3ForCausalLM",
         {{"layer_types", {"full_attention", "sliding_attention"}}},
         {file, "sliding_attention", "full_attention"}},
        {"MistralForCausalLM",
         {{"sliding_window", 100}, {"layer_types", {"full_attention"}}},
         {file, "full_attention", "sliding_attention"}},
    };
    for (const auto& [architecture, changes, parts] : cases) {
        SCOPED_TRACE(architecture + " " + changes.dump());
        expect_error<BadInput>([&] { build(architecture, changes.is_null() ? json::object() : changes); },
                               parts);
    }
}

TEST(ModelGraph, RefusesFieldsItDoesNotKnow) {
    const std::vector<std::pair<std::string, json>> fields = {
        {"use_rope", false},
        {"position_embedding_type", "alibi"},
        {"query_pre_attn_scalar", 256},
        {"attention_chunk_size", 8192},
        {"attention_type", "swa"},
        {"is_causal", false},
        {"bidirectional", true},
        {"swiglu_limit", 7.0},
        {"attention_sink", true},
        {"zero_centered_gamma", true},
        {"num_kv_shared_layers", 10},
        {"auto_map", {{"AutoModelForCausalLM", "modeling_x.XForCausalLM"}}},
        {"is_encoder_decoder", true},
        {"embedding_multiplier", 12.0},
        {"norm_eps", 1e-3},
        {"pruned_heads", {{"0", {1}}}},
        {"a_field_of_tomorrow", 0},
    };
    for (const auto& [field, value] : fields) {
        for (const std::string family : {"Llama", "Mistral", "Qwen2", "Qwen3"}) {
            SCOPED_TRACE(family + " " + field);
            expect_error<BadInput>([&] { build(family + "ForCausalLM", {{field, value}}); },
                                   {"model/config.json", "'" + field + "'", value.dump(), "take"});
        }
    }
}

TEST(ModelGraph, IgnoresFieldsThatAreOffOrHarmless) {
    const json harmless{
        {"attention_dropout", 0.0},  {"initializer_range", 0.02},         {"embedding_multiplier", 1.0},
        {"logits_scaling", 1},       {"attn_logit_softcapping", nullptr}, {"num_local_experts", 0},
        {"rope_scaling", nullptr},   {"max_window_layers", 21},           {"torch_dtype", "bfloat16"},
        {"use_cache", true},         {"transformers_version", "5.0"},     {"no_rope_layers", json::array()},
        {"auto_map", json::object()}};
    EXPECT_EQ(build("Qwen2ForCausalLM", harmless).blocks, 2);
}

// config.json of published checkpoints, as their makers wrote them.
const std::vector<const char*> kPublished = {
    // Llama 2
    R"({"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000})",
    // Llama 3.2
    R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
    "use_cache": true, "vocab_size": 128256})",
    // SmolLM2
    R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
    "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "use_cache": true,
    "vocab_size": 49152})",
    // Mistral 7B v0.1
    R"({"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000})",
    // Qwen2.5
    R"({"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
    "intermediate_size": 29568, "max_position_embeddings": 131072, "max_window_layers": 80,
    "model_type": "qwen2", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false,
    "use_sliding_window": false, "vocab_size": 152064})",
    // Qwen3
    R"({"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
    "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
    "use_sliding_window": false, "vocab_size": 151936})",
};

// What to_dict of transformers 5 adds to the fields of a family.
const char* const kOfTransformers5 = R"({"transformers_version": "5.23.0", "output_hidden_states": false,
    "return_dict": true, "dtype": "bfloat16", "chunk_size_feed_forward": 0, "is_encoder_decoder": false,
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": null, "use_cache": true,
    "rope_scaling": null, "rope_theta": null, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "output_attentions": false, "_name_or_path": "", "pad_token_id": null})";

TEST(ModelGraph, AcceptsConfigsOfPublishedCheckpoints) {
    for (const char* text : kPublished) {
        SCOPED_TRACE(text);
        json config = json::parse(text);
        EXPECT_NO_THROW(build_model_graph(config, "config.json"));
        config.update(json::parse(kOfTransformers5));
        EXPECT_NO_THROW(build_model_graph(config, "config.json"));
    }
}

TEST(ModelConfig, GettersNameFileAndField) {
    const json values{{"count", 3},          {"share", 0.5},        {"flag", true},   {"word", "silu"},
                      {"words", {"a", "b"}}, {"table", {{"x", 1}}}, {"none", nullptr}};
    ModelConfig config(values, "c.json");
    EXPECT_EQ(config.integer("count"), 3);
    EXPECT_EQ(config.integer("none", 7), 7);
    EXPECT_EQ(config.number("share"), 0.5);
    EXPECT_EQ(config.number("absent", 2.0), 2.0);
    EXPECT_TRUE(config.boolean("flag", false));
    EXPECT_EQ(config.text("word", ""), "silu");
    EXPECT_EQ(config.texts("words"), (Names{"a", "b"}));
    EXPECT_EQ(config.texts("none"), Names{});
    EXPECT_EQ(config.object("table").at("x"), 1);
    EXPECT_TRUE(config.object("none").is_null());
    expect_error<BadInput>([&] { config.integer("share"); },
                           {"c.json", "'share'", "0.5", "positive integer"});
    expect_error<BadInput>([&] { config.integer("absent"); }, {"c.json", "'absent'", "missing"});
    expect_error<BadInput>([&] { config.number("word", 1.0); }, {"c.json", "'word'", "number"});
    expect_error<BadInput>([&] { config.boolean("count", true); }, {"c.json", "'count'", "true or false"});
    expect_error<BadInput>([&] { config.text("count", ""); }, {"c.json", "'count'", "string"});
    expect_error<BadInput>([&] { config.texts("count"); }, {"c.json", "'count'", "list of strings"});
    expect_error<BadInput>([&] { config.object("count"); }, {"c.json", "'count'", "object"});
}

TEST(ModelConfig, FieldsThatWereReadAreNotRefused) {
    const json values{{"residual_multiplier", 0.2}};
    ModelConfig unread(values, "c.json");
    expect_error<BadInput>([&] { unread.refuse_unknown_fields(); }, {"c.json", "residual_multiplier", "0.2"});
    ModelConfig read(values, "c.json");
    read.number("residual_multiplier");
    EXPECT_NO_THROW(read.refuse_unknown_fields());
}

}  // namespace
}  // namespace quantmill
