#include "bench/synthetic_checkpoint.h"

#include <fmt/format.h>
#include <hdf5.h>

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "kernels/error.h"
#include "kernels/half.h"
#include "pipeline/checkpoint_writer.h"
#include "pipeline/files.h"
#include "tests/pipeline/tiny_checkpoint.h"

namespace quantmill::bench {
namespace {

namespace fs = std::filesystem;
constexpr std::int64_t kVocabulary = 4096;

struct ShapeOf {
    const char* architecture;
    std::int64_t hidden, inner, heads, kv_heads;
};
const std::map<std::string, ShapeOf> kShapes = {{"tiny", {"LlamaForCausalLM", 256, 768, 4, 2}},
                                                {"llama-3-8b", {"LlamaForCausalLM", 4096, 14336, 32, 8}},
                                                {"llama-3-70b", {"LlamaForCausalLM", 8192, 28672, 64, 8}},
                                                {"qwen2.5-72b", {"Qwen2ForCausalLM", 8192, 29568, 64, 8}}};

nlohmann::json config_of(const SyntheticModel& model) {
    const auto found = kShapes.find(model.shape);
    if (found == kShapes.end()) {
        throw BadInput("unknown shape '{}': tiny, llama-3-8b, llama-3-70b or qwen2.5-72b", model.shape);
    }
    const ShapeOf& shape = found->second;
    return {{"architectures", {shape.architecture}},
            {"hidden_size", shape.hidden},
            {"intermediate_size", shape.inner},
            {"num_hidden_layers", model.blocks},
            {"num_attention_heads", shape.heads},
            {"num_key_value_heads", shape.kv_heads},
            {"vocab_size", kVocabulary},
            {"max_position_embeddings", 8192},
            {"rms_norm_eps", 1e-5},
            {"rope_theta", 500000.0},
            {"torch_dtype", "bfloat16"}};
}

// Normal values with the deviation that trained weights of such widths have. Drawing billions would take
// longer than the benchmark, so tensors are filled from one long row of them, each from another place.
class Noise {
public:
    Noise() {
        std::mt19937 random(7);
        std::normal_distribution<float> normal(0.0F, 0.02F);
        for (BFloat16& value : values_) value = to_bfloat16(normal(random));
    }
    std::vector<BFloat16> take(std::int64_t count) {
        std::vector<BFloat16> taken;
        taken.reserve(static_cast<std::size_t>(count));
        while (taken.size() < static_cast<std::size_t>(count)) {
            const std::size_t piece =
                std::min(static_cast<std::size_t>(count) - taken.size(), values_.size() - next_);
            const auto from = values_.begin() + static_cast<std::ptrdiff_t>(next_);
            taken.insert(taken.end(), from, from + static_cast<std::ptrdiff_t>(piece));
            next_ = (next_ + piece) % values_.size();
        }
        return taken;
    }

private:
    std::vector<BFloat16> values_ = std::vector<BFloat16>(9'999'991);  // a prime
    std::size_t next_ = 0;
};

void write_model(const SyntheticModel& model, const fs::path& directory) {
    fs::create_directories(directory);
    const nlohmann::json config = config_of(model);
    const ModelGraph graph = build_model_graph(config, "config.json");
    const auto shards = layout_shards(testing::tensors_of(graph, "BF16"), 5'000'000'000);
    std::vector<std::size_t> all(shards.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
    CheckpointWriter writer(directory, shards, all);
    Noise noise;
    for (const OutputShard& shard : shards) {
        for (const StoredTensor& tensor : shard.tensors) {
            const bool norm = tensor.shape.size() == 1 && tensor.name.ends_with("norm.weight");
            const auto values = norm
                                    ? std::vector(static_cast<std::size_t>(tensor.count()), to_bfloat16(1.0F))
                                    : noise.take(tensor.count());
            writer.write(tensor.name, values.data(), values.size() * sizeof(values[0]));
        }
    }
    writer.finish();
    write_text(directory / "tokenizer.json", "{}");
    write_text(directory / "config.json", config.dump(2));
    write_text(directory / "model.safetensors.index.json", make_index_json(shards));
}

void write_integers(hid_t file, const char* name, std::span<const hsize_t> shape,
                    const std::vector<std::int32_t>& values) {
    const hid_t space = H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
    const hid_t set = H5Dcreate2(file, name, H5T_STD_I32LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    const herr_t status = H5Dwrite(set, H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data());
    H5Dclose(set);
    H5Sclose(space);
    if (status < 0) throw InfrastructureError("{} of the synthetic calibration store was not written", name);
}

void write_attribute(hid_t file, const char* name, hid_t type, const void* value) {
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t attribute = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, type, value);
    H5Aclose(attribute);
    H5Sclose(space);
}

void write_text_attribute(hid_t file, const char* name, const std::string& text) {
    const hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, text.size());
    write_attribute(file, name, type, text.data());
    H5Tclose(type);
}

void write_store(const SyntheticModel& model, const fs::path& path, const std::string& tokenizer) {
    std::mt19937 random(11);
    std::uniform_int_distribution<std::int32_t> token(0, kVocabulary - 1);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(model.sequences * model.length));
    for (std::int32_t& id : ids) id = token(random);
    const std::array shape{static_cast<hsize_t>(model.sequences), static_cast<hsize_t>(model.length)};
    const std::vector<std::int32_t> lengths(static_cast<std::size_t>(model.sequences),
                                            static_cast<std::int32_t>(model.length));
    const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    if (file < 0) throw InfrastructureError("{} cannot be written", path.string());
    write_integers(file, "/input_ids", shape, ids);
    write_integers(file, "/lengths", std::span(shape).first(1), lengths);
    write_attribute(file, "vocab_size", H5T_NATIVE_INT64, &kVocabulary);
    write_text_attribute(file, "tokenizer", tokenizer);
    write_text_attribute(file, "source", "random tokens");
    H5Fclose(file);
}

}  // namespace

void write_synthetic_model(const SyntheticModel& model, const fs::path& directory) {
    if (!fs::exists(directory / "model/model.safetensors.index.json")) {
        write_model(model, directory / "model");
    } else if (read_text(directory / "model/config.json") != config_of(model).dump(2)) {
        throw BadInput("{} holds a model of another shape: remove it, or name another --directory",
                       (directory / "model").string());
    }
    write_store(model, directory / "calibration.h5", sha256_of_file(directory / "model/tokenizer.json"));
}

}  // namespace quantmill::bench
