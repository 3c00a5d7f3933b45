#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace quantmill::bench {

// A model of a named shape, cut to a few blocks.
struct SyntheticModel {
    std::string shape = "tiny";  // tiny | llama-3-8b | llama-3-70b | qwen2.5-72b
    int blocks = 3;
    std::int64_t sequences = 128, length = 2048;
};

// Writes a bf16 checkpoint with random weights to directory/model and a calibration store with random tokens
// to directory/calibration.h5, unless they are there. The vocabulary is cut to 4096, since no block sees it.
void write_synthetic_model(const SyntheticModel& model, const std::filesystem::path& directory);

}  // namespace quantmill::bench
