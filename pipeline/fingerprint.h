#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pipeline/checkpoint_reader.h"

namespace quantmill {

// What tells one model from another without reading all of it: SHA-256 of the configuration and of every
// tensor's name, type, shape and samples from its beginning, middle and end.
std::string fingerprint_of_model(const CheckpointReader& reader);

// SHA-256 of the token sequences, in order.
std::string fingerprint_of_tokens(const std::vector<std::vector<std::int32_t>>& sequences);

// Of each sequence the first 64 bits of the SHA-256 of its ids, as 16 hexadecimal digits.
std::vector<std::string> fingerprints_of_sequences(const std::vector<std::vector<std::int32_t>>& sequences);

}  // namespace quantmill
