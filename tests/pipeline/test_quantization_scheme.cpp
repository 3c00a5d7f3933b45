#include <gtest/gtest.h>

#include <regex>

#include "pipeline/gptq_format.h"
#include "pipeline/quantization_scheme.h"
#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/tiny_checkpoint.h"

namespace quantmill {
namespace {

using nlohmann::ordered_json;
using testing::expect_error;

ModelGraph graph_of(int blocks) {
    nlohmann::json config = testing::tiny_config("LlamaForCausalLM");
    config["num_hidden_layers"] = blocks;
    return build_model_graph(config, "config.json");
}

GptqOptions of_bits(int bits) {
    GptqOptions options;
    options.grid = {bits, 32, true};
    return options;
}

// The scheme as config.json tells it and GptqSchemes reads it.
GptqSchemes written(const ModelGraph& graph, const QuantizationScheme& scheme) {
    ordered_json config{{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 32}};
    config["dynamic"] = dynamic_of(graph, scheme);
    return {config, "config.json"};
}

TEST(QuantizationScheme, NothingIsSaidOfWhatIsAlike) {
    const ModelGraph graph = graph_of(3);
    const QuantizationScheme scheme(graph, of_bits(4));
    EXPECT_TRUE(dynamic_of(graph, scheme).is_null());
    EXPECT_TRUE(modules_in_block_of(graph, scheme).is_null());
    EXPECT_FALSE(scheme.quantizes_head());
    EXPECT_EQ(scheme.blocks(), 3);
}

TEST(QuantizationScheme, EveryModuleReadsBackItsOwn) {
    const ModelGraph graph = graph_of(12);
    QuantizationScheme scheme(graph, of_bits(4));
    scheme.set(1, 0, of_bits(8));
    scheme.set(11, 0, of_bits(8));
    scheme.set(2, 2, std::nullopt);
    for (int block = 0; block < 12; ++block) scheme.set(block, 3, of_bits(3));
    GptqOptions head = of_bits(8);
    head.grid.group_size = -1;
    scheme.set(12, 0, head);
    EXPECT_EQ(scheme.blocks(), 13);
    const GptqSchemes schemes = written(graph, scheme);
    for (int block = 0; block <= 12; ++block) {
        for (std::size_t stage = 0; stage < graph.stages_of(block).size(); ++stage) {
            for (const Linear& linear : graph.stages_of(block)[stage].group.linears) {
                const std::string name = graph.in_block(block, linear.name);
                const auto& expected = scheme.options_at(block, stage);
                const auto read = schemes.at(name);
                ASSERT_EQ(read.has_value(), expected.has_value()) << name;
                if (!read) continue;
                EXPECT_EQ(read->grid.bits, expected->grid.bits) << name;
                EXPECT_EQ(read->grid.group_size, std::max<std::int64_t>(expected->grid.group_size, 0))
                    << name;
            }
        }
    }
    // What vLLM fuses, and names that only begin alike.
    EXPECT_EQ(schemes.at("model.layers.11.self_attn.qkv_proj")->grid.bits, 8);
    EXPECT_EQ(schemes.at("model.layers.1.self_attn.qkv_proj")->grid.bits, 8);
    EXPECT_EQ(schemes.at("model.layers.10.self_attn.qkv_proj")->grid.bits, 4);
    EXPECT_FALSE(schemes.at("model.layers.2.mlp.gate_up_proj"));
    EXPECT_EQ(schemes.at("model.layers.2.mlp.down_proj")->grid.bits, 3);
}

TEST(QuantizationScheme, TheWordsOfTheRules) {
    const ModelGraph graph = graph_of(2);
    QuantizationScheme scheme(graph, of_bits(4));
    scheme.set(1, 0, of_bits(8));
    scheme.set(0, 2, std::nullopt);
    EXPECT_EQ(
        dynamic_of(graph, scheme).dump(),
        R"({"^model\\.layers\\.(?:1)\\.self_attn\\.(?:q|k|v|qkv)_proj$":{"bits":8,"group_size":32,"sym":true,)"
        R"("desc_act":false},"-:^model\\.layers\\.(?:0)\\.mlp\\.(?:gate|up|gate_up)_proj$":{}})");
}

TEST(QuantizationScheme, ListsOfNamesForTransformers) {
    const ModelGraph graph = graph_of(2);
    QuantizationScheme alike(graph, of_bits(4));
    for (int block = 0; block < 2; ++block) alike.set(block, 0, std::nullopt);
    EXPECT_EQ(modules_in_block_of(graph, alike).dump(),
              R"([["self_attn.o_proj"],["mlp.gate_proj","mlp.up_proj"],["mlp.down_proj"]])");
    QuantizationScheme mixed(graph, of_bits(4));
    for (std::size_t stage = 0; stage < 3; ++stage) mixed.set(0, stage, std::nullopt);
    mixed.set(1, 0, std::nullopt);
    EXPECT_EQ(
        modules_in_block_of(graph, mixed).dump(),
        R"([["model.layers.0.mlp.down_proj"],["model.layers.1.self_attn.o_proj"],)"
        R"(["model.layers.1.mlp.gate_proj","model.layers.1.mlp.up_proj"],["model.layers.1.mlp.down_proj"]])");
}

// As GPTQModel reads it: the first rule that matches the beginning of a name, in the order of the file.
TEST(GptqSchemes, RulesOfOthers) {
    const GptqSchemes schemes(ordered_json::parse(R"({"quant_method": "gptq", "bits": 4, "group_size": 128,
        "dynamic": {"z.*\\.1\\.": {"bits": 8, "group_size": -1}, "+:.*down": {"desc_act": true, "sym": false},
                    "-:.*\\.2\\.": {}, ".*": {"bits": 3}}})"),
                              "config.json");
    EXPECT_TRUE(schemes.mixed());
    EXPECT_EQ(schemes.at("z.x.1.down")->grid.bits, 8);
    EXPECT_EQ(schemes.at("z.x.1.down")->grid.group_size, 0);
    EXPECT_EQ(schemes.at("a.x.2.down")->grid.bits, 4);
    EXPECT_TRUE(schemes.at("a.x.2.down")->desc_act);
    EXPECT_FALSE(schemes.at("a.x.2.down")->grid.sym);
    EXPECT_FALSE(schemes.at("a.x.2.up"));
    EXPECT_EQ(schemes.at("anything")->grid.bits, 3);
}

TEST(GptqSchemes, RulesThatAreNone) {
    const auto with = [](const std::string& dynamic) {
        const auto config = ordered_json::parse(
            R"({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": )" + dynamic + "}");
        return [config] { GptqSchemes(config, "config.json"); };
    };
    expect_error<BadInput>(with(R"({"(": {}})"), {"config.json", "dynamic", "'('"});
    expect_error<BadInput>(with(R"({"a": {"bits": 5}})"), {"config.json", "5 bits"});
    expect_error<BadInput>(with(R"({"a": {"bits": "x"}})"), {"config.json", "'a'"});
    expect_error<BadInput>(with("[1]"), {"config.json", "dynamic"});
}

}  // namespace
}  // namespace quantmill
