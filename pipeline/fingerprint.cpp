#include "pipeline/fingerprint.h"

#include <algorithm>

#include "pipeline/sha256.h"

namespace quantmill {
namespace {

constexpr std::uint64_t kSample = 4096;  // bytes

}  // namespace

std::string fingerprint_of_model(const CheckpointReader& reader) {
    Sha256 sha;
    sha.add(reader.config().dump());
    std::vector<std::byte> sample;
    for (const auto& [name, tensor] : reader.tensors()) {
        sha.add(nlohmann::json{name, tensor.dtype, tensor.shape}.dump());
        const std::uint64_t bytes = tensor.bytes();
        sample.resize(std::min(kSample, bytes));
        for (const std::uint64_t offset :
             {std::uint64_t{0}, (bytes - sample.size()) / 2, bytes - sample.size()}) {
            reader.read(name, offset, sample.data(), sample.size());
            sha.add(sample.data(), sample.size());
        }
    }
    return sha.finish();
}

std::string fingerprint_of_tokens(const std::vector<std::vector<std::int32_t>>& sequences) {
    Sha256 sha;
    for (const auto& sequence : sequences) {
        const auto length = static_cast<std::int64_t>(sequence.size());
        sha.add(&length, sizeof length);
        sha.add(sequence.data(), sequence.size() * sizeof sequence[0]);
    }
    return sha.finish();
}

std::vector<std::string> fingerprints_of_sequences(const std::vector<std::vector<std::int32_t>>& sequences) {
    std::vector<std::string> fingerprints;
    for (const auto& sequence : sequences) {
        Sha256 sha;
        sha.add(sequence.data(), sequence.size() * sizeof sequence[0]);
        fingerprints.push_back(sha.finish().substr(0, 16));
    }
    return fingerprints;
}

}  // namespace quantmill
