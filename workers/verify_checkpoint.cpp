#include "workers/verify_checkpoint.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <map>

#include "kernels/half.h"
#include "pipeline/block_weights.h"
#include "pipeline/model_graph.h"

namespace quantmill {
namespace {

struct Matrix {
    std::int64_t rows = 0;
    std::int64_t columns = 0;
};

template <class T>
std::vector<T> read_all(const CheckpointReader& reader, const std::string& name) {
    std::vector<T> values(reader.find(name).bytes() / sizeof(T));
    reader.read(name, values.data());
    return values;
}

bool is_true(const nlohmann::json& object, const std::string& key) {
    const auto value = object.find(key);
    return value != object.end() && !value->is_null() && *value != nlohmann::json(false) &&
           *value != nlohmann::json(0);
}

// Whether meta.quantizer names this program, whose scales are never subnormal.
bool made_by_us(const nlohmann::json& meta) {
    const auto names = meta.find("quantizer");
    return names != meta.end() && names->is_array() &&
           std::any_of(names->begin(), names->end(), [](const nlohmann::json& name) {
               return name.is_string() && name.get<std::string>().starts_with("quantmill:");
           });
}

// What quantization_config promises of the tensors, beside the scheme.
struct Promises {
    bool quantized = false;  // of a plain checkpoint the rest means nothing
    bool lm_head = false;
    bool partial = false;  // linears may be left as they were
    bool signed_scales = false;
    bool normal_scales = false;
};

Promises promises_of(const nlohmann::json& config) {
    const auto found = config.find("meta");
    const nlohmann::json meta =
        found != config.end() && found->is_object() ? *found : nlohmann::json::object();
    const auto names_some = [&](const char* key) { return config.contains(key) && !config.at(key).empty(); };
    return {true, is_true(config, "lm_head"),
            names_some("dynamic") || names_some("modules_in_block_to_quantize"),
            is_true(meta, "signed_scales"), made_by_us(meta)};
}

// 16-bit scales [G, R], already known to be finite.
void check_scales(const CheckpointReader& reader, const StoredTensor& tensor, const Promises& promises) {
    const bool bf16 = tensor.dtype == "BF16";
    const std::uint32_t smallest_normal = bf16 ? 0x0080U : 0x0400U;
    const auto rows = static_cast<std::size_t>(tensor.shape[1]);
    const auto values = read_all<std::uint16_t>(reader, tensor.name);
    for (std::size_t i = 0; i < values.size(); ++i) {
        const std::uint32_t magnitude = values[i] & 0x7FFFU;
        const bool negative = (values[i] & 0x8000U) != 0 && !promises.signed_scales;
        const bool small = magnitude < (promises.normal_scales ? smallest_normal : 1U);
        if (!negative && !small) continue;
        throw BadInput("{}: tensor '{}' holds {} for group {}, row {}: a scale must be {}{}",
                       reader.file_of(tensor.name).string(), tensor.name,
                       bf16 ? to_float(BFloat16{values[i]}) : to_float(Half{values[i]}), i / rows, i % rows,
                       promises.signed_scales ? "other than 0" : "above 0",
                       promises.normal_scales ? " and not subnormal" : "");
    }
}

void check_zeros(const CheckpointReader& reader, const std::string& prefix, const Matrix& matrix,
                 const GptqScheme& scheme) {
    if (!scheme.grid.sym) return;
    const std::string name = prefix + ".qzeros";
    const std::int64_t groups = scheme.grid.groups(matrix.columns);
    const auto zeros = unpack_zeros(read_all<std::uint32_t>(reader, name), matrix.rows, groups,
                                    scheme.grid.bits, scheme.format);
    const int expected = 1 << (scheme.grid.bits - 1);
    const auto wrong = std::find_if(zeros.begin(), zeros.end(), [&](int zero) { return zero != expected; });
    if (wrong == zeros.end()) return;
    const auto position = wrong - zeros.begin();
    throw BadInput(
        "{}: tensor '{}' holds the zero {} for group {}, row {}: with sym and checkpoint_format {} it is {}; "
        "config.json names another format than the file's, or the file is damaged",
        reader.file_of(name).string(), name, *wrong, position % groups, position / groups,
        name_of(scheme.format), expected);
}

// Without desc_act columns follow one another; with it any column may be in any group, but all are full.
void check_groups(const CheckpointReader& reader, const std::string& prefix, const Matrix& matrix,
                  const QuantizationGrid& grid, bool desc_act) {
    const std::int64_t groups = grid.groups(matrix.columns);
    std::vector<std::int64_t> members(static_cast<std::size_t>(groups));
    std::int64_t column = 0;
    for (const std::int32_t group : read_all<std::int32_t>(reader, prefix + ".g_idx")) {
        if (group < 0 || group >= groups) {
            throw BadInput("{}.g_idx: group {} is out of range (0 … {})", prefix, group, groups - 1);
        }
        if (!desc_act && group != column / grid.group_size) {
            throw BadInput("{}.g_idx: column {} is in group {}, without desc_act it belongs to group {}",
                           prefix, column, group, column / grid.group_size);
        }
        ++members[static_cast<std::size_t>(group)];
        ++column;
    }
    for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t expected = std::min(grid.group_size, matrix.columns - group * grid.group_size);
        const std::int64_t found = members[static_cast<std::size_t>(group)];
        if (found == expected) continue;
        throw BadInput("{}.g_idx: group {} has {} columns, its group_size asks for {}", prefix, group, found,
                       expected);
    }
}

class Verifier {
public:
    explicit Verifier(const CheckpointReader& reader) : reader_(reader), schemes_(schemes_of(reader)) {
        if (schemes_) promises_ = promises_of(reader.config().at("quantization_config"));
    }

    // Names and shapes first, since that reads nothing.
    void verify() {
        check_stray_tensors();
        check_model(build_model_graph(reader_.config(), (reader_.directory() / "config.json").string()));
        for (const auto& [name, tensor] : reader_.tensors()) check_finite(tensor);
        for (const auto& [prefix, matrix] : quantized_) {
            const GptqScheme scheme = scheme_for(prefix, matrix);
            check_scales(reader_, reader_.find(prefix + ".scales"), promises_);
            check_zeros(reader_, prefix, matrix, scheme);
            check_groups(reader_, prefix, matrix, scheme.grid, scheme.desc_act);
        }
    }

private:
    GptqScheme scheme_for(const std::string& prefix, const Matrix& matrix) const {
        GptqScheme scheme = scheme_of_module(*schemes_, prefix, reader_);
        if (scheme.grid.group_size == 0) scheme.grid.group_size = matrix.columns;
        return scheme;
    }

    void require(const std::string& name, const std::vector<std::int64_t>& shape) const {
        reader_.find(name, shape);
        weight_dtype(reader_, name);
    }

    // Quantized linears, whether the model has them or not: all their tensors or none.
    void check_stray_tensors() {
        for (const auto& [name, tensor] : reader_.tensors()) {
            const std::string prefix = name.substr(0, name.rfind('.'));
            if (name.ends_with(".qweight")) {
                check_qweight(prefix, tensor);
            } else if (promises_.quantized && !reader_.contains(prefix + ".qweight") &&
                       (name.ends_with(".qzeros") || name.ends_with(".scales") || name.ends_with(".g_idx"))) {
                throw BadInput("{}: tensor '{}' is there without its '{}.qweight'",
                               reader_.directory().string(), name, prefix);
            }
        }
    }

    void check_qweight(const std::string& prefix, const StoredTensor& qweight) {
        if (!promises_.quantized) {
            throw BadInput("{}: {} is quantized, but config.json has no quantization_config",
                           reader_.directory().string(), qweight.name);
        }
        if (reader_.contains(prefix + ".weight")) {
            throw BadInput("{}: both '{}.weight' and '{}' are there", reader_.directory().string(), prefix,
                           qweight.name);
        }
        const int bits = scheme_of_module(*schemes_, prefix, reader_).grid.bits;
        if (qweight.shape.size() != 2 || qweight.count() == 0 || qweight.shape[0] * 32 % bits != 0) {
            throw BadInput("{}: qweight of shape [{}] does not hold {}-bit codes", prefix,
                           fmt::join(qweight.shape, ", "), bits);
        }
        check_quantized(prefix, {qweight.shape[1], qweight.shape[0] * 32 / bits});
    }

    void check_quantized(const std::string& prefix, const Matrix& matrix) {
        const QuantizationGrid grid = scheme_for(prefix, matrix).grid;
        for (const StoredTensor& expected : gptq_tensors(prefix, matrix.rows, matrix.columns, grid)) {
            const StoredTensor& stored = reader_.find(expected.name, expected.shape);
            const bool bf16_scales = expected.name.ends_with(".scales") && stored.dtype == "BF16";
            if (stored.dtype != expected.dtype && !bf16_scales) {
                throw BadInput("{}: dtype {} where {} is expected", stored.name, stored.dtype,
                               expected.dtype);
            }
        }
        quantized_[prefix] = matrix;
    }

    void check_model(const ModelGraph& graph) {
        require(graph.embedding, {graph.vocab_size, graph.hidden_size});
        require(graph.final_norm, {graph.hidden_size});
        const std::string& head = graph.head.front().group.linears.front().name;
        if (promises_.quantized && promises_.lm_head && reader_.contains(head + ".qweight")) {
            check_quantized(head, {graph.vocab_size, graph.hidden_size});
        } else {
            require(graph.lm_head, {graph.vocab_size, graph.hidden_size});
        }
        for (int block = 0; block < graph.blocks; ++block) {
            for (const auto& [norm, length] : graph.norms()) require(graph.in_block(block, norm), {length});
            for (const Stage& stage : graph.stages) {
                for (const Linear& linear : stage.group.linears) {
                    check_linear(graph.in_block(block, linear.name), linear);
                }
            }
        }
    }

    void check_linear(const std::string& prefix, const Linear& linear) {
        const bool plain =
            !promises_.quantized || (promises_.partial && !reader_.contains(prefix + ".qweight"));
        if (plain) {
            require(prefix + ".weight", {linear.rows, linear.columns});
        } else {
            check_quantized(prefix, {linear.rows, linear.columns});
        }
        if (linear.bias) {
            require(prefix + ".bias", {linear.rows});
        } else if (reader_.contains(prefix + ".bias")) {
            check_bias_is_zero(prefix + ".bias");
        }
    }

    // Old quantizers gave every linear a bias; one of zeros changes nothing.
    void check_bias_is_zero(const std::string& name) const {
        const auto bytes = read_all<std::byte>(reader_, name);
        if (std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{0}; }))
            return;
        throw BadInput("{}: tensor '{}' is there, but config.json says that this linear has no bias",
                       reader_.directory().string(), name);
    }

    void check_finite(const StoredTensor& tensor) const {
        const auto dtype = dtype_from_safetensors(tensor.dtype);
        if (!dtype || *dtype == DType::i64 || *dtype == DType::i32 || *dtype == DType::u8) return;
        require_finite(tensor, read_all<std::byte>(reader_, tensor.name).data(),
                       reader_.file_of(tensor.name).string());
    }

    const CheckpointReader& reader_;
    std::optional<GptqSchemes> schemes_;
    Promises promises_;
    std::map<std::string, Matrix> quantized_;
};

}  // namespace

void verify_checkpoint(const CheckpointReader& reader) { Verifier(reader).verify(); }

}  // namespace quantmill
