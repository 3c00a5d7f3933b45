#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace quantmill {

// Token sequences in an HDF5 file: /input_ids int32 [N, L] padded with -1, /lengths int32 [N],
// attributes vocab_size, tokenizer (sha256 of tokenizer.json) and source. tools/calibrate.py writes
// it.
struct CalibrationStore {
    std::vector<std::vector<std::int32_t>> sequences;
    std::int64_t sequence_length = 0;  // L of the file
    std::int64_t vocab_size = 0;
    std::string tokenizer;  // sha256
    std::string source;
};

struct CalibrationRequest {
    std::optional<std::int64_t> sequences;        // the first that many; default: all
    std::optional<std::int64_t> sequence_length;  // longer ones are cut, shorter ones kept
    std::int64_t vocab_size = 0;                  // the model's
    std::filesystem::path tokenizer_json;         // the model's; may be missing
    bool allow_tokenizer_mismatch = false;
};

// Reads and checks a store. Throws BadInput for a file that is not HDF5 or lacks a data set, ids
// out of range, empty sequences, fewer sequences than asked for, a larger vocabulary than the
// model's, another tokenizer.
CalibrationStore load_calibration_store(const std::filesystem::path& path, const CalibrationRequest& request);

}  // namespace quantmill
