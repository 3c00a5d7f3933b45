#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/dtype.h"
#include "pipeline/files.h"

namespace quantmill {

// The safetensors format: 8-byte little-endian header length N, N bytes of JSON, then the data.

// A tensor of a file. `dtype` is the format's own name ("BF16"); offsets count from the file's
// start.
struct StoredTensor {
    std::string name;
    std::string dtype;
    std::vector<std::int64_t> shape;
    std::uint64_t begin = 0, end = 0;
    std::uint64_t bytes() const { return end - begin; }
    std::int64_t count() const;
};

// Our dtype for a stored one; nothing for types that we carry but do not compute with (F8_E4M3,
// BOOL …).
std::optional<DType> dtype_from_safetensors(std::string_view name);
std::string_view safetensors_name(DType dtype);
std::optional<std::uint64_t> safetensors_bits(std::string_view dtype);  // of an element; none: unknown

struct SafetensorsHeader {
    std::vector<StoredTensor> tensors;            // in the order of their data
    std::map<std::string, std::string> metadata;  // "__metadata__"
    std::uint64_t data_begin = 0;                 // 8 + N
};

// Parses and validates the JSON text of a header for a file of `file_size` bytes; `file` is for
// messages. Throws BadInput for everything that docs/safetensors.md lists.
SafetensorsHeader parse_safetensors_header(std::string_view text, std::uint64_t file_size,
                                           const std::string& file);
SafetensorsHeader read_safetensors_header(const InputFile& file);

// The first 8 + N bytes of a file that holds `tensors` back to back in the given order, padded with
// spaces to a multiple of 8. Sets begin and end of each. Throws when it exceeds the format's 100
// MB.
std::string make_safetensors_header(std::vector<StoredTensor>& tensors,
                                    const std::map<std::string, std::string>& metadata);

}  // namespace quantmill
