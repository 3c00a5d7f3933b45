#pragma once

#include <cstddef>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/backend.h"
#include "pipeline/quantized_linear.h"
#include "pipeline/safetensors.h"

namespace quantmill {

// The GPTQ file format: a linear P is stored as P.qweight i32 [C·b/32, R], P.qzeros i32 [G, R·b/32],
// P.scales f16 [G, R], P.g_idx i32 [C]. gptq (v1) stores zero − 1 in qzeros, gptq_v2 stores zero.
enum class GptqFormat { v1, v2 };
std::string_view name_of(GptqFormat format);         // "gptq" | "gptq_v2"
GptqFormat gptq_format_from(std::string_view name);  // throws BadInput for another name

// Names, dtypes and shapes of the tensors that hold linear `prefix`.
std::vector<StoredTensor> gptq_tensors(const std::string& prefix, std::int64_t rows, std::int64_t columns,
                                       const QuantizationGrid& grid);

// Why [rows, columns] cannot be stored on this grid; empty when it can.
std::string gptq_obstacle(std::int64_t rows, std::int64_t columns, const QuantizationGrid& grid,
                          GptqFormat format);

// Rows [begin, end) of a group's result on their way to a file: packed by the backend, then downloaded by a
// lane.
class EncodedLinear {
public:
    // What one of this shape keeps on the host: codes as packed; scales and zeros [R, G].
    struct HostMemory {
        HostMemory(Backend& backend, std::int64_t rows, std::int64_t columns, const QuantizationGrid& grid);
        std::size_t bytes() const { return qweight.size() + scales.size() + zeros.size(); }
        HostBuffer qweight, scales, zeros;
    };

    EncodedLinear(Backend& backend, CopyLane& lane, const QuantizedLinear& quantized, std::int64_t begin,
                  std::int64_t end);
    std::size_t bytes() const { return host_.bytes(); }

    using Sink = std::function<void(const std::string& name, const void* data, std::size_t bytes)>;
    // Waits for the download, then hands the tensors of linear `prefix` to sink. On any thread.
    void write(const std::string& prefix, GptqFormat format, const Sink& sink) const;

private:
    QuantizationGrid grid_;
    std::size_t rows_, groups_;
    std::vector<std::int32_t> g_idx_;
    HostMemory host_;
    EventPtr arrived_;
};

// How a checkpoint says it is quantized: the relevant part of its quantization_config.
struct GptqScheme {
    QuantizationGrid grid;  // group_size -1 is kept as 0 here: one group a row
    GptqFormat format = GptqFormat::v1;
    bool desc_act = false;
};
// The scheme of config.json's quantization_config. Throws BadInput for methods other than gptq.
GptqScheme gptq_scheme_from(const nlohmann::json& quantization_config, const std::string& file);

// A checkpoint whose modules may differ: what its quantization_config says, and the first rule of `dynamic`
// whose expression matches the beginning of a module's name, as GPTQModel and vLLM read it.
class GptqSchemes {
public:
    // Throws BadInput as gptq_scheme_from does, also for a rule that is none. The order of keys matters.
    GptqSchemes(const nlohmann::ordered_json& quantization_config, const std::string& file);

    const GptqScheme& usual() const { return usual_; }
    // Nothing: the module is not quantized.
    std::optional<GptqScheme> at(const std::string& module) const;
    bool mixed() const { return !rules_.empty(); }

private:
    struct Rule {
        std::regex pattern;
        std::optional<GptqScheme> scheme;
    };
    GptqScheme usual_;
    std::vector<Rule> rules_;
};

// The zeros u8 [R, G] that the words of a P.qzeros hold.
std::vector<std::uint8_t> unpack_zeros(const std::vector<std::uint32_t>& words, std::int64_t rows,
                                       std::int64_t groups, int bits, GptqFormat format);

// Reads the tensors of a linear by name; used by decode_gptq.
using TensorBytes = std::function<std::vector<std::byte>(const std::string& name)>;
// The inverse of EncodedLinear for any g_idx and for checkpoints made by others. Throws BadInput for a g_idx
// out of range.
QuantizedLinear decode_gptq(Backend& backend, const std::string& prefix, std::int64_t rows,
                            std::int64_t columns, const GptqScheme& scheme, const TensorBytes& read);

}  // namespace quantmill
