// libFuzzer target: any bytes either give a header that keeps the format's promises, or BadInput.
#include <cstdlib>
#include <set>

#include "kernels/error.h"
#include "tests/fuzz/read_header.h"

namespace {

void require(bool promise) {
    if (!promise) std::abort();
}

void check(const quantmill::SafetensorsHeader& header, std::size_t size) {
    std::set<std::string> names;
    std::uint64_t expected = header.data_begin;
    for (const quantmill::StoredTensor& tensor : header.tensors) {
        require(names.insert(tensor.name).second);
        require(tensor.begin == expected && tensor.end >= tensor.begin);
        expected = tensor.end;
        const auto bits = quantmill::safetensors_bits(tensor.dtype);
        require(bits.has_value() && tensor.count() >= 0);
        require(static_cast<std::uint64_t>(tensor.count()) * *bits == 8 * tensor.bytes());
    }
    require(expected == size);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        check(quantmill::testing::read_header_of(data, size), size);
    } catch (const quantmill::BadInput&) {  // the only answer to bytes that are no safetensors file
    }
    return 0;
}
