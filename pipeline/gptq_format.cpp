#include "pipeline/gptq_format.h"

#include <algorithm>
#include <cstring>

#include "kernels/error.h"

namespace quantmill {
namespace {

// Codes k of a row occupy bits [k·b, (k + 1)·b) of an LSB-first stream of words; they may straddle.
std::vector<std::uint32_t> pack_row(const std::vector<std::uint32_t>& codes, int bits) {
    std::vector<std::uint32_t> words(codes.size() * static_cast<std::size_t>(bits) / 32);
    for (std::size_t k = 0; k < codes.size(); ++k) {
        const std::size_t bit = k * static_cast<std::size_t>(bits);
        const std::uint64_t shifted = static_cast<std::uint64_t>(codes[k]) << (bit % 32);
        words[bit / 32] |= static_cast<std::uint32_t>(shifted);
        if ((shifted >> 32U) != 0) words[bit / 32 + 1] |= static_cast<std::uint32_t>(shifted >> 32U);
    }
    return words;
}

std::uint32_t unpack_code(const std::uint32_t* words, std::size_t k, int bits) {
    const std::size_t bit = k * static_cast<std::size_t>(bits);
    std::uint64_t window = words[bit / 32];
    if (bit % 32 + static_cast<std::size_t>(bits) > 32) {
        window |= static_cast<std::uint64_t>(words[bit / 32 + 1]) << 32U;
    }
    return static_cast<std::uint32_t>(window >> (bit % 32)) & ((1U << static_cast<unsigned>(bits)) - 1U);
}

template <class T>
std::span<const T> values_of(const HostBuffer& buffer) {
    return {reinterpret_cast<const T*>(buffer.data()), buffer.size() / sizeof(T)};
}

template <class T>
std::vector<T> from_bytes(const std::vector<std::byte>& bytes) {
    std::vector<T> values(bytes.size() / sizeof(T));
    std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
    return values;
}

// [R, G] -> [G, R]
template <class T>
std::vector<T> transposed(std::span<const T> values, std::size_t rows, std::size_t columns) {
    std::vector<T> result(values.size());
    for (std::size_t r = 0; r < rows; ++r) {
        for (std::size_t c = 0; c < columns; ++c) result[c * rows + r] = values[r * columns + c];
    }
    return result;
}

// zero − 1 wraps inside the field when zero is 0, so that readers which add 1 modulo 2^b restore it.
std::vector<std::uint32_t> pack_zeros(const HostBuffer& stored, std::size_t rows, std::size_t groups,
                                      int bits, GptqFormat format) {
    const auto zeros = values_of<std::uint8_t>(stored);
    const std::uint32_t mask = (1U << static_cast<unsigned>(bits)) - 1U;
    const std::uint32_t offset = format == GptqFormat::v1 ? 1 : 0;
    std::vector<std::uint32_t> packed;
    for (std::size_t g = 0; g < groups; ++g) {
        std::vector<std::uint32_t> row(rows);
        for (std::size_t r = 0; r < rows; ++r) row[r] = (zeros[r * groups + g] - offset) & mask;
        const std::vector<std::uint32_t> words = pack_row(row, bits);
        packed.insert(packed.end(), words.begin(), words.end());
    }
    return packed;
}

}  // namespace

std::string_view name_of(GptqFormat format) { return format == GptqFormat::v1 ? "gptq" : "gptq_v2"; }

GptqFormat gptq_format_from(std::string_view name) {
    if (name == "gptq") return GptqFormat::v1;
    if (name == "gptq_v2") return GptqFormat::v2;
    throw BadInput("checkpoint format '{}' is not known (gptq | gptq_v2)", name);
}

std::vector<StoredTensor> gptq_tensors(const std::string& prefix, std::int64_t rows, std::int64_t columns,
                                       const QuantizationGrid& grid) {
    const std::int64_t groups = grid.groups(columns);
    return {{prefix + ".qweight", "I32", {columns * grid.bits / 32, rows}, 0, 0},
            {prefix + ".qzeros", "I32", {groups, rows * grid.bits / 32}, 0, 0},
            {prefix + ".scales", "F16", {groups, rows}, 0, 0},
            {prefix + ".g_idx", "I32", {columns}, 0, 0}};
}

std::string gptq_obstacle(std::int64_t rows, std::int64_t columns, const QuantizationGrid& grid,
                          GptqFormat format) {
    if (columns % 32 != 0) return fmt::format("its {} columns are not a multiple of 32", columns);
    if (rows * grid.bits % 32 != 0) {
        return fmt::format("its {} rows of {}-bit zeros do not fill 32-bit words", rows, grid.bits);
    }
    if (!grid.sym && format == GptqFormat::v1) {
        return "asymmetric zeros of 0 borrow across fields in format gptq: use output.format: gptq_v2";
    }
    return {};
}

EncodedLinear::HostMemory::HostMemory(Backend& backend, std::int64_t rows, std::int64_t columns,
                                      const QuantizationGrid& grid) {
    const auto buffer = [&](std::int64_t count, DType dtype) {
        return backend.host_buffer(static_cast<std::size_t>(count) * size_of(dtype), "linears to be written");
    };
    const std::int64_t groups = grid.groups(columns);
    qweight = buffer(columns * grid.bits / 32 * rows, DType::i32);
    scales = buffer(rows * groups, DType::f16);
    zeros = buffer(rows * groups, DType::u8);
}

EncodedLinear::EncodedLinear(Backend& backend, CopyLane& lane, const QuantizedLinear& quantized,
                             std::int64_t begin, std::int64_t end)
    : grid_(quantized.grid),
      rows_(static_cast<std::size_t>(end - begin)),
      groups_(static_cast<std::size_t>(grid_.groups(quantized.columns()))),
      g_idx_(quantized.g_idx),
      host_(backend, end - begin, quantized.columns(), grid_) {
    const ConstQuantizedViews views = quantized.rows(begin, end);
    Tensor packed =
        backend.empty({quantized.columns() * grid_.bits / 32, end - begin}, DType::i32, "packed codes");
    backend.pack(views.codes, grid_.bits, packed);
    lane.after(*backend.record());
    lane.download(packed, host_.qweight.data());
    lane.download(views.scales, host_.scales.data());
    lane.download(views.zeros, host_.zeros.data());
    arrived_ = lane.record();
    backend.after(*arrived_);  // before the tensors' memory is used again
}

void EncodedLinear::write(const std::string& prefix, GptqFormat format, const Sink& sink) const {
    arrived_->wait();
    sink(prefix + ".qweight", host_.qweight.data(), host_.qweight.size());
    const auto zeros = pack_zeros(host_.zeros, rows_, groups_, grid_.bits, format);
    sink(prefix + ".qzeros", zeros.data(), zeros.size() * sizeof(zeros[0]));
    const auto scales = transposed(values_of<std::uint16_t>(host_.scales), rows_, groups_);
    sink(prefix + ".scales", scales.data(), scales.size() * sizeof(scales[0]));
    sink(prefix + ".g_idx", g_idx_.data(), g_idx_.size() * sizeof(g_idx_[0]));
}

namespace {

// Whether a field that some writers leave null or write as 0 or 1 is set.
bool flag(const nlohmann::json& object, const char* key, bool otherwise) {
    const auto value = object.find(key);
    if (value == object.end() || value->is_null()) return otherwise;
    return *value != nlohmann::json(false) && *value != nlohmann::json(0);
}

// Takes the fields of a config, or of a rule of `dynamic`, over those of `scheme`.
void take_fields(const nlohmann::json& fields, const std::string& file, GptqScheme& scheme) {
    QuantizationGrid& grid = scheme.grid;
    if (fields.contains("bits")) grid.bits = fields.at("bits").get<int>();
    if (fields.contains("group_size")) {
        grid.group_size = std::max<std::int64_t>(fields.at("group_size").get<std::int64_t>(), 0);
    }
    grid.sym = flag(fields, "sym", grid.sym);
    scheme.desc_act = flag(fields, "desc_act", scheme.desc_act);
    if (grid.bits != 2 && grid.bits != 3 && grid.bits != 4 && grid.bits != 8) {
        throw BadInput("{}: {} bits are not supported (2 | 3 | 4 | 8)", file, grid.bits);
    }
}

}  // namespace

GptqScheme gptq_scheme_from(const nlohmann::json& config, const std::string& file) {
    try {
        if (const auto method = config.at("quant_method").get<std::string>(); method != "gptq") {
            throw BadInput("{}: quant_method '{}' is not supported (gptq)", file, method);
        }
        GptqScheme scheme;
        config.at("bits");
        config.at("group_size");
        take_fields(config, file, scheme);
        if (config.contains("checkpoint_format")) {
            scheme.format = gptq_format_from(config.at("checkpoint_format").get<std::string>());
        }
        return scheme;
    } catch (const nlohmann::json::exception& error) {
        throw BadInput("{}: quantization_config: {}", file, error.what());
    }
}

GptqSchemes::GptqSchemes(const nlohmann::ordered_json& config, const std::string& file)
    : usual_(gptq_scheme_from(nlohmann::json(config), file)) {
    const auto dynamic = config.find("dynamic");
    if (dynamic == config.end() || dynamic->is_null()) return;
    if (!dynamic->is_object()) throw BadInput("{}: quantization_config.dynamic is no map", file);
    for (const auto& [key, fields] : dynamic->items()) {
        const bool skips = key.starts_with("-:");
        const std::string pattern = skips || key.starts_with("+:") ? key.substr(2) : key;
        try {
            Rule rule{std::regex(pattern), std::nullopt};
            if (!skips) take_fields(nlohmann::json(fields), file, rule.scheme.emplace(usual_));
            rules_.push_back(std::move(rule));
        } catch (const std::regex_error& error) {
            throw BadInput(
                "{}: quantization_config.dynamic: '{}' is no regular expression that this program "
                "reads: {}",
                file, pattern, error.what());
        } catch (const nlohmann::json::exception& error) {
            throw BadInput("{}: quantization_config.dynamic: '{}': {}", file, key, error.what());
        }
    }
}

std::optional<GptqScheme> GptqSchemes::at(const std::string& module) const {
    for (const Rule& rule : rules_) {
        if (std::regex_search(module, rule.pattern, std::regex_constants::match_continuous)) {
            return rule.scheme;
        }
    }
    return usual_;
}

std::vector<std::uint8_t> unpack_zeros(const std::vector<std::uint32_t>& words, std::int64_t rows,
                                       std::int64_t groups, int bits, GptqFormat format) {
    const std::uint32_t offset = format == GptqFormat::v1 ? 1 : 0;
    const std::uint32_t mask = (1U << static_cast<unsigned>(bits)) - 1U;
    const auto words_per_group = static_cast<std::size_t>(rows * bits / 32);
    std::vector<std::uint8_t> zeros(static_cast<std::size_t>(rows * groups));
    for (std::size_t g = 0; g < static_cast<std::size_t>(groups); ++g) {
        for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
            const std::uint32_t code = unpack_code(words.data() + g * words_per_group, r, bits);
            zeros[r * static_cast<std::size_t>(groups) + g] =
                static_cast<std::uint8_t>((code + offset) & mask);
        }
    }
    return zeros;
}

QuantizedLinear decode_gptq(Backend& backend, const std::string& prefix, std::int64_t rows,
                            std::int64_t columns, const GptqScheme& scheme, const TensorBytes& read) {
    QuantizationGrid grid = scheme.grid;
    if (grid.group_size == 0) grid.group_size = columns;
    QuantizedLinear quantized(backend, rows, columns, grid);
    const std::int64_t groups = grid.groups(columns);

    Tensor packed = backend.empty({columns * grid.bits / 32, rows}, DType::i32, "packed codes");
    backend.copy_from_host(read(prefix + ".qweight").data(), packed);
    backend.unpack(packed, grid.bits, quantized.codes);

    const auto stored_scales = from_bytes<std::uint16_t>(read(prefix + ".scales"));
    const auto scales = transposed<std::uint16_t>(stored_scales, static_cast<std::size_t>(groups),
                                                  static_cast<std::size_t>(rows));
    backend.copy_from_host(scales.data(), quantized.scales);

    const auto zeros = unpack_zeros(from_bytes<std::uint32_t>(read(prefix + ".qzeros")), rows, groups,
                                    grid.bits, scheme.format);
    backend.copy_from_host(zeros.data(), quantized.zeros);

    quantized.g_idx = from_bytes<std::int32_t>(read(prefix + ".g_idx"));
    for (const std::int32_t group : quantized.g_idx) {
        if (group < 0 || group >= groups) {
            throw BadInput("{}.g_idx: group {} is out of range (0 … {})", prefix, group, groups - 1);
        }
    }
    return quantized;
}

}  // namespace quantmill
