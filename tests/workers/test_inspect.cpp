#include <fmt/format.h>
#include <gtest/gtest.h>

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

// Two linears [64, 96] of 4 bits in groups of 32, all codes and scales zero.
void write_quantized(const TemporaryDirectory& directory, const json& changes = json::object(),
                     const std::string& without = "") {
    json scheme{{"quant_method", "gptq"}, {"bits", 4}, {"group_size", 32}, {"checkpoint_format", "gptq_v2"}};
    scheme.update(changes);
    directory.write("config.json", json{{"quantization_config", scheme}}.dump());
    std::vector<StoredTensor> tensors{{"model.norm.weight", "BF16", {64}, 0, 0}};
    for (const std::string block : {"0", "1"}) {
        for (const StoredTensor& tensor :
             gptq_tensors("model.layers." + block + ".mlp.down_proj", 64, 96, {4, 32, true})) {
            if (tensor.name != without) tensors.push_back(tensor);
        }
    }
    testing::write_zeros(directory / "model.safetensors", tensors);
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
    const TemporaryDirectory directory;
    write_quantized(directory);
    const std::string text = inspect_checkpoint(directory.path());
    // 4 bits, and a 16-bit scale and a 4-bit zero for 32 weights, and 32 bits of g_idx for a column of 64.
    const std::string bits = fmt::format("{:.2f}", 4 + 20.0 / 32 + 32.0 / 64);
    EXPECT_TRUE(has_line(text, {"model.layers.*.mlp.down_proj", "2", "gptq_v2 4 bits g32", "[64, 96]", bits}))
        << text;
    EXPECT_FALSE(has_line(text, {"qzeros"})) << "counted with its linear";
}

TEST(Inspect, RefusesWhatDoesNotFitTheScheme) {
    const std::string prefix = "model.layers.1.mlp.down_proj";
    const std::vector<std::tuple<json, std::string, std::vector<std::string>>> cases = {
        {{{"group_size", 64}}, "", {".qzeros", "[3, 8]", "[2, 8]"}},
        {{{"bits", 8}}, "", {"down_proj"}},
        {{{"bits", 3}}, "", {"down_proj"}},
        {{{"quant_method", "awq"}}, "", {"config.json", "awq"}},
        {json::object(), prefix + ".qzeros", {prefix + ".qzeros"}},
        {json::object(), prefix + ".scales", {prefix + ".scales"}},
        {json::object(), prefix + ".g_idx", {prefix + ".g_idx"}},
    };
    for (const auto& [changes, without, parts] : cases) {
        SCOPED_TRACE(changes.dump() + without);
        const TemporaryDirectory directory;
        write_quantized(directory, changes, without);
        expect_error<BadInput>([&] { inspect_checkpoint(directory.path()); }, parts);
    }
}

TEST(Inspect, RefusesQuantizedTensorsWithoutAScheme) {
    const TemporaryDirectory directory;
    write_quantized(directory);
    directory.write("config.json", "{}");
    expect_error<BadInput>([&] { inspect_checkpoint(directory.path()); }, {"qweight", "quantization_config"});
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
