#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>

#include "pipeline/gptq_format.h"
#include "tests/pipeline/expect_error.h"
#include "tests/pipeline/tiny_checkpoint.h"
#include "workers/inspect.h"

namespace quantmill {
namespace {

using nlohmann::json;
using testing::expect_error;
using testing::TemporaryDirectory;
using testing::tiny_config;

bool has_line(const std::string& text, const std::vector<std::string>& parts) {
    for (std::size_t begin = 0; begin < text.size();) {
        const std::size_t end = std::min(text.find('\n', begin), text.size());
        const std::string line = text.substr(begin, end - begin);
        if (std::ranges::all_of(
                parts, [&](const std::string& part) { return line.find(part) != std::string::npos; }))
            return true;
        begin = end + 1;
    }
    return false;
}

// A checkpoint in memory, for a test to damage.
struct Checkpoint {
    json config;
    std::map<std::string, std::pair<StoredTensor, std::string>> tensors;  // with their bytes

    void put(const StoredTensor& tensor, const std::string& element) {
        std::string& bytes = (tensors[tensor.name] = {tensor, ""}).second;
        for (std::int64_t i = 0; i < tensor.count(); ++i) bytes += element;
    }
    template <class T>
    void set(const std::string& name, std::size_t index, T value) {
        std::memcpy(tensors.at(name).second.data() + index * sizeof(T), &value, sizeof(T));
    }
    void write(const TemporaryDirectory& directory) const {
        directory.write("config.json", config.dump());
        std::vector<StoredTensor> list;
        for (const auto& [name, tensor] : tensors) list.push_back(tensor.first);
        std::string file = make_safetensors_header(list, {{"format", "pt"}});
        for (const auto& [name, tensor] : tensors) file += tensor.second;
        directory.write("model.safetensors", file);
    }
    // What `inspect` says.
    std::string inspect() const {
        const TemporaryDirectory directory;
        write(directory);
        return inspect_checkpoint(directory.path());
    }
};

const std::string kZero16(2, '\0'), kZero32(4, '\0'), kOneHalf("\x00\x3C", 2), kOneBFloat("\x80\x3F", 2);

// The tiny Llama of 4 bits in groups of 32, as `run` writes it, with fields of its scheme changed.
Checkpoint quantized(const json& changes = json::object()) {
    json scheme{{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 32}, {"checkpoint_format", "gptq_v2"}};
    scheme.update(changes);
    Checkpoint checkpoint{tiny_config("LlamaForCausalLM"), {}};
    checkpoint.config["quantization_config"] = scheme;
    const std::int64_t group = scheme.at("group_size") == -1 ? 1000 : scheme.at("group_size").get<int>();
    for (const StoredTensor& tensor :
         testing::tensors_of(build_model_graph(checkpoint.config, "config.json"), "BF16")) {
        const std::string prefix = tensor.name.substr(0, tensor.name.rfind('.'));
        if (!prefix.ends_with("_proj")) {
            checkpoint.put(tensor, kOneBFloat);
            continue;
        }
        const auto parts = gptq_tensors(prefix, tensor.shape[0], tensor.shape[1], {4, group, true});
        checkpoint.put(parts[0], kZero32);
        checkpoint.put(parts[1], std::string(4, scheme.at("checkpoint_format") == "gptq" ? '\x77' : '\x88'));
        checkpoint.put(parts[2], kOneHalf);
        checkpoint.put(parts[3], kZero32);
        for (std::int32_t c = 0; c < tensor.shape[1]; ++c) {
            checkpoint.set(prefix + ".g_idx", static_cast<std::size_t>(c),
                           c / static_cast<std::int32_t>(group));
        }
    }
    return checkpoint;
}

TEST(Inspect, TableOfAPlainCheckpoint) {
    const TemporaryDirectory directory;
    testing::write_tiny_checkpoint(directory, tiny_config("LlamaForCausalLM"));
    const std::string text = inspect_checkpoint(directory.path());
    EXPECT_TRUE(has_line(text, {"model.layers.*.mlp.down_proj.weight", "2", "BF16", "[64, 96]", "16.00"}))
        << text;
    EXPECT_TRUE(has_line(text, {"model.embed_tokens.weight", "1", "[128, 64]"})) << text;
    EXPECT_TRUE(has_line(text, {"1 file(s), 21 tensors, verified"})) << text;
}

TEST(Inspect, TableOfAQuantizedCheckpoint) {
    const std::string text = quantized().inspect();
    // 4 bits, and a 16-bit scale and a 4-bit zero for 32 weights, and 32 bits of g_idx for a column of 64.
    const std::string bits = fmt::format("{:.2f}", 4 + 20.0 / 32 + 32.0 / 64);
    EXPECT_TRUE(has_line(text, {"model.layers.*.mlp.down_proj", "2", "gptq_v2 4 bits g32", "[64, 96]", bits}))
        << text;
    EXPECT_FALSE(has_line(text, {"qzeros"})) << "counted with its linear";
}

const std::string kDown = "model.layers.1.mlp.down_proj", kOther = "model.layers.0.mlp.up_proj";

TEST(Inspect, AcceptsWhatTheFormatAllows) {
    EXPECT_NO_THROW(quantized({{"checkpoint_format", "gptq"}}).inspect());
    EXPECT_NO_THROW(quantized({{"group_size", -1}}).inspect());
    EXPECT_NO_THROW(quantized({{"group_size", 40}}).inspect());  // the last group is smaller

    Checkpoint any_order = quantized({{"desc_act", true}});
    any_order.set<std::int32_t>(kDown + ".g_idx", 0, 2);
    any_order.set<std::int32_t>(kDown + ".g_idx", 95, 0);
    EXPECT_NO_THROW(any_order.inspect());

    Checkpoint asymmetric = quantized({{"sym", false}});
    asymmetric.set<std::uint32_t>(kDown + ".qzeros", 5, 0x01234567U);
    EXPECT_NO_THROW(asymmetric.inspect());

    Checkpoint signed_scales = quantized({{"meta", {{"signed_scales", true}}}});
    signed_scales.set<std::uint16_t>(kDown + ".scales", 7, 0xBC00U);
    EXPECT_NE(signed_scales.inspect().find("% of the scales are negative"), std::string::npos);

    Checkpoint others_subnormal = quantized({{"meta", {{"quantizer", {"gptqmodel:7.7.0"}}}}});
    others_subnormal.set<std::uint16_t>(kDown + ".scales", 7, 0x03FFU);
    EXPECT_NO_THROW(others_subnormal.inspect());

    Checkpoint partial = quantized({{"dynamic", {{"-:down_proj", json::object()}}}});
    for (const std::string kind : {".qweight", ".qzeros", ".scales", ".g_idx"})
        partial.tensors.erase(kDown + kind);
    partial.put({kDown + ".weight", "BF16", {64, 96}, 0, 0}, kOneBFloat);
    EXPECT_NO_THROW(partial.inspect());

    Checkpoint head = quantized({{"lm_head", true}});
    head.tensors.erase("lm_head.weight");
    const auto parts = gptq_tensors("lm_head", 128, 64, {4, 32, true});
    head.put(parts[0], kZero32);
    head.put(parts[1], std::string(4, '\x88'));
    head.put(parts[2], kOneBFloat);  // scales may be fp16 or bf16 of width 2
    head.put(parts[3], kZero32);
    for (std::size_t c = 32; c < 64; ++c) head.set<std::int32_t>("lm_head.g_idx", c, 1);
    EXPECT_NO_THROW(head.inspect());

    Checkpoint extra = quantized();
    extra.put({"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {16}, 0, 0}, kZero32);
    extra.put({kDown + ".bias", "F16", {64}, 0, 0}, kZero16);  // as AutoGPTQ writes it
    EXPECT_NO_THROW(extra.inspect());
}

TEST(Inspect, RefusesWhatDoesNotFitTheScheme) {
    const std::vector<std::pair<json, std::vector<std::string>>> cases = {
        {{{"group_size", 64}}, {".qzeros", "[3, 8]", "[2, 8]"}},
        {{{"bits", 8}}, {"down_proj"}},
        {{{"bits", 3}}, {"down_proj"}},
        {{{"quant_method", "awq"}}, {"config.json", "awq"}},
        {{{"checkpoint_format", "gptq"}}, {".qzeros", "zero 9", "gptq", "is 8"}},
    };
    for (const auto& [changes, parts] : cases) {
        SCOPED_TRACE(changes.dump());
        Checkpoint checkpoint = quantized();
        checkpoint.config["quantization_config"].update(changes);
        expect_error<BadInput>([&] { checkpoint.inspect(); }, parts);
    }
    Checkpoint v1 = quantized({{"checkpoint_format", "gptq"}});
    v1.config["quantization_config"]["checkpoint_format"] = "gptq_v2";
    expect_error<BadInput>([&] { v1.inspect(); }, {".qzeros", "zero 7", "gptq_v2", "is 8", "another format"});
}

struct Damage {
    std::string what;
    std::function<void(Checkpoint&)> apply;
    std::vector<std::string> parts;
    json scheme = json::object();
};

std::function<void(Checkpoint&)> without(const std::vector<std::string>& names) {
    return [names](Checkpoint& checkpoint) {
        for (const std::string& name : names) checkpoint.tensors.erase(name);
    };
}

template <class T>
std::function<void(Checkpoint&)> with(const std::string& name, std::size_t index, T value) {
    return [=](Checkpoint& checkpoint) { checkpoint.set<T>(name, index, value); };
}

const json kOurs{{"meta", {{"quantizer", {"quantmill:1.0.0"}}}}};

const std::vector<Damage> kDamages = {
    {"a linear missing",
     without({kDown + ".qweight", kDown + ".qzeros", kDown + ".scales", kDown + ".g_idx"}),
     {kDown + ".qweight", "config.json"}},
    {"codes missing", without({kDown + ".qweight"}), {kDown, "without", ".qweight"}},
    {"zeros missing", without({kDown + ".qzeros"}), {kDown + ".qzeros"}},
    {"scales missing", without({kDown + ".scales"}), {kDown + ".scales"}},
    {"g_idx missing", without({kDown + ".g_idx"}), {kDown + ".g_idx"}},
    {"final norm missing", without({"model.norm.weight"}), {"model.norm.weight"}},
    {"embedding missing", without({"model.embed_tokens.weight"}), {"model.embed_tokens.weight"}},
    {"lm_head missing", without({"lm_head.weight"}), {"lm_head.weight"}},
    {"norm of a block missing",
     without({"model.layers.0.input_layernorm.weight"}),
     {"model.layers.0.input_layernorm.weight"}},
    {"more rows in config.json",
     [](Checkpoint& c) { c.config["intermediate_size"] = 128; },
     {"mlp", "96", "128"}},
    {"another vocabulary", [](Checkpoint& c) { c.config["vocab_size"] = 127; }, {"[128, 64]", "[127, 64]"}},
    {"weight beside its codes",
     [](Checkpoint& c) { c.put({kDown + ".weight", "BF16", {64, 96}, 0, 0}, kZero16); },
     {kDown + ".weight", kDown + ".qweight"}},
    {"weight in place of codes",
     [](Checkpoint& c) {
         without({kDown + ".qweight", kDown + ".qzeros", kDown + ".scales", kDown + ".g_idx"})(c);
         c.put({kDown + ".weight", "BF16", {64, 96}, 0, 0}, kZero16);
     },
     {kDown + ".qweight"}},
    {"empty codes",
     [](Checkpoint& c) { c.put({kDown + ".qweight", "I32", {0, 64}, 0, 0}, kZero32); },
     {kDown, "[0, 64]"},
     {{"group_size", -1}}},
    {"NaN in a norm",
     with<std::uint16_t>("model.norm.weight", 3, 0x7FC0U),
     {"model.norm.weight", "nan", "3"}},
    {"infinity in the head",
     with<std::uint16_t>("lm_head.weight", 64, 0xFF80U),
     {"lm_head.weight", "inf", "row 1, column 0"}},
    {"NaN beside the model",
     [](Checkpoint& c) { c.put({"extra", "F32", {1}, 0, 0}, "\xFF\xFF\xFF\x7F"); },
     {"extra", "nan"}},
    {"NaN as scale", with<std::uint16_t>(kDown + ".scales", 70, 0x7E00U), {kDown + ".scales", "nan"}},
    {"zero as scale",
     with<std::uint16_t>(kDown + ".scales", 70, 0U),
     {kDown + ".scales", "holds 0 for group 1, row 6"}},
    {"negative zero as signed scale",
     with<std::uint16_t>(kDown + ".scales", 70, 0x8000U),
     {kDown + ".scales", "other than 0"},
     {{"meta", {{"signed_scales", true}}}}},
    {"negative scale", with<std::uint16_t>(kDown + ".scales", 70, 0xBC00U), {kDown + ".scales", "-1"}},
    {"subnormal scale of ours",
     with<std::uint16_t>(kDown + ".scales", 70, 0x03FFU),
     {kDown + ".scales", "subnormal"},
     kOurs},
    {"zeros of no symmetric grid",
     with<std::uint32_t>(kOther + ".qzeros", 13, 0x88838888U),
     {kOther + ".qzeros", "zero 3", "group 1, row 12"}},
    {"all columns in one group",
     [](Checkpoint& c) { c.put(c.tensors.at(kDown + ".g_idx").first, kZero32); },
     {kDown + ".g_idx", "column 32", "group 0", "group 1"}},
    {"all columns in one group with desc_act",
     [](Checkpoint& c) { c.put(c.tensors.at(kDown + ".g_idx").first, kZero32); },
     {kDown + ".g_idx", "group 0 has 96 columns", "32"},
     {{"desc_act", true}}},
    {"group out of range",
     with<std::int32_t>(kDown + ".g_idx", 5, 3),
     {kDown + ".g_idx", "3", "out of range"}},
    {"bias that is denied",
     [](Checkpoint& c) { c.put({kDown + ".bias", "F16", {64}, 0, 0}, kOneHalf); },
     {kDown + ".bias", "config.json"}},
    {"unknown architecture",
     [](Checkpoint& c) { c.config["architectures"] = {"GemmaForCausalLM"}; },
     {"GemmaForCausalLM"}},
};

TEST(Inspect, RefusesDamage) {
    for (const Damage& damage : kDamages) {
        SCOPED_TRACE(damage.what);
        Checkpoint checkpoint = quantized(damage.scheme);
        EXPECT_NO_THROW(checkpoint.inspect());
        damage.apply(checkpoint);
        expect_error<BadInput>([&] { checkpoint.inspect(); }, damage.parts);
    }
}

TEST(Inspect, RefusesADamagedPlainCheckpoint) {
    const TemporaryDirectory directory;
    testing::write_tiny_checkpoint(directory, tiny_config("LlamaForCausalLM"));
    json config = tiny_config("LlamaForCausalLM");
    config["attention_bias"] = true;
    directory.write("config.json", config.dump());
    expect_error<BadInput>([&] { inspect_checkpoint(directory.path()); }, {"q_proj.bias", "config.json"});
}

TEST(Inspect, RefusesQuantizedTensorsWithoutAScheme) {
    Checkpoint checkpoint = quantized();
    checkpoint.config.erase("quantization_config");
    expect_error<BadInput>([&] { checkpoint.inspect(); }, {"qweight", "quantization_config"});
}

TEST(Inspect, RefusesWhatIsNoCheckpoint) {
    const TemporaryDirectory directory;
    expect_error<BadInput>([&] { inspect_checkpoint(directory / "none"); }, {"none", "directory"});
    expect_error<BadInput>([&] { inspect_checkpoint(directory.path()); }, {"config.json"});
    directory.write("config.json", "{}");
    expect_error<BadInput>([&] { inspect_checkpoint(directory.path()); }, {"model.safetensors"});
}

}  // namespace
}  // namespace quantmill
