#include "workers/inspect.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <optional>

#include "jobs/text.h"
#include "pipeline/block_weights.h"
#include "pipeline/gptq_format.h"
#include "workers/verify_checkpoint.h"

namespace quantmill {
namespace {

constexpr std::string_view kQweight = ".qweight";

// One line of the table: modules or tensors that differ in their block number only.
struct Row {
    std::string scheme, shape;
    std::int64_t count = 0;
    std::int64_t weights = 0;
    std::uint64_t bytes = 0;
};

// "model.layers.12.mlp" -> "model.layers.*.mlp"
std::string without_numbers(const std::string& name) {
    std::string result;
    std::size_t begin = 0;
    while (begin <= name.size()) {
        const std::size_t end = std::min(name.find('.', begin), name.size());
        const std::string part = name.substr(begin, end - begin);
        const bool number = !part.empty() && std::all_of(part.begin(), part.end(), [](unsigned char c) {
            return std::isdigit(c) != 0;
        });
        result += (begin == 0 ? "" : ".") + (number ? "*" : part);
        begin = end + 1;
    }
    return result;
}

// The row of one quantized linear, already verified; `prefix` is its module name.
Row row_of_linear(const CheckpointReader& reader, const std::string& prefix, const GptqScheme& scheme) {
    const StoredTensor& qweight = reader.find(prefix + ".qweight");
    const std::int64_t rows = qweight.shape[1];
    const std::int64_t columns = qweight.shape[0] * 32 / scheme.grid.bits;
    QuantizationGrid grid = scheme.grid;
    if (grid.group_size == 0) grid.group_size = columns;

    Row row{fmt::format("{} {} bits g{}{}", name_of(scheme.format), grid.bits, grid.group_size,
                        grid.sym ? "" : " asym"),
            fmt::format("[{}, {}]", rows, columns), 1, rows * columns, 0};
    for (const StoredTensor& tensor : gptq_tensors(prefix, rows, columns, grid)) {
        row.bytes += reader.find(tensor.name).bytes();
    }
    return row;
}

bool belongs_to_quantized(const CheckpointReader& reader, const std::string& name) {
    for (const std::string_view suffix : {".qzeros", ".scales", ".g_idx"}) {
        if (name.ends_with(suffix)) {
            return reader.contains(name.substr(0, name.size() - suffix.size()) + std::string(kQweight));
        }
    }
    return false;
}

struct ScaleCount {
    std::int64_t all = 0, negative = 0;
};

void count_scales(const CheckpointReader& reader, const std::string& prefix, ScaleCount& count) {
    std::vector<std::uint16_t> scales(reader.find(prefix + ".scales").bytes() / sizeof(std::uint16_t));
    reader.read(prefix + ".scales", scales.data());
    count.all += static_cast<std::int64_t>(scales.size());
    count.negative +=
        std::count_if(scales.begin(), scales.end(), [](unsigned bits) { return (bits & 0x8000U) != 0; });
}

// A checkpoint without negative scales has nothing to say of them.
std::string negative_share(const ScaleCount& count) {
    if (count.negative == 0) return {};
    return fmt::format("{:.1f}% of the scales are negative (meta.signed_scales)\n",
                       100.0 * static_cast<double>(count.negative) / static_cast<double>(count.all));
}

void add(std::map<std::string, Row>& rows, const std::string& name, const Row& row) {
    const auto [it, fresh] = rows.try_emplace(without_numbers(name) + "\n" + row.scheme + row.shape, row);
    if (fresh) return;
    it->second.count += row.count;
    it->second.weights += row.weights;
    it->second.bytes += row.bytes;
}

std::string to_table(const std::map<std::string, Row>& rows) {
    std::vector<std::vector<std::string>> cells{
        {"tensors", "count", "scheme", "shape", "size", "bits/weight"}};
    Row total;
    for (const auto& [key, row] : rows) {
        cells.push_back({key.substr(0, key.find('\n')), std::to_string(row.count), row.scheme, row.shape,
                         bytes_text(row.bytes),
                         row.weights == 0 ? ""
                                          : fmt::format("{:.2f}", 8.0 * static_cast<double>(row.bytes) /
                                                                      static_cast<double>(row.weights))});
        total.count += row.count;
        total.weights += row.weights;
        total.bytes += row.bytes;
    }
    cells.push_back(
        {"all", std::to_string(total.count), "", "", bytes_text(total.bytes),
         fmt::format("{:.2f}", 8.0 * static_cast<double>(total.bytes) /
                                   static_cast<double>(std::max<std::int64_t>(total.weights, 1)))});
    return table_text(cells, "lrllrr");
}

}  // namespace

std::string inspect_checkpoint(const std::filesystem::path& directory) {
    const CheckpointReader reader(directory);
    verify_checkpoint(reader);
    const std::optional<GptqSchemes> schemes = schemes_of(reader);
    std::map<std::string, Row> rows;
    ScaleCount scales;
    for (const auto& [name, tensor] : reader.tensors()) {
        if (schemes && name.ends_with(kQweight)) {
            const std::string prefix = name.substr(0, name.size() - kQweight.size());
            add(rows, prefix, row_of_linear(reader, prefix, scheme_of_module(*schemes, prefix, reader)));
            count_scales(reader, prefix, scales);
        } else if (!belongs_to_quantized(reader, name)) {
            add(rows, name,
                {tensor.dtype, fmt::format("[{}]", fmt::join(tensor.shape, ", ")), 1, tensor.count(),
                 tensor.bytes()});
        }
    }
    return to_table(rows) +
           fmt::format(
               "\n{} file(s), {} tensors, verified: headers, index, names, shapes, finite "
               "values, scales, zeros and groups\n",
               reader.files().size(), reader.tensors().size()) +
           negative_share(scales);
}

}  // namespace quantmill
