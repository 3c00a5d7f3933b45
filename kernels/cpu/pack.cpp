#include <algorithm>
#include <cstdint>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

constexpr std::int64_t kRun = kPackedRun;
constexpr std::int64_t kRowBlock = 64;  // rows a thread takes at a time: their words share cache lines

// 32 codes -> `bits` words; the words of a row lie `stride` apart.
void pack_run(const std::uint8_t* codes, int bits, std::int32_t* words, std::int64_t stride) {
    std::uint64_t stream = 0;
    int filled = 0;
    for (std::int64_t i = 0; i < kRun; ++i) {
        stream |= std::uint64_t{codes[i]} << static_cast<unsigned>(filled);
        filled += bits;
        if (filled >= 32) {
            *words = static_cast<std::int32_t>(static_cast<std::uint32_t>(stream));
            words += stride;
            stream >>= 32U;
            filled -= 32;
        }
    }
}

void unpack_run(const std::int32_t* words, std::int64_t stride, int bits, std::uint8_t* codes) {
    const std::uint64_t mask = (std::uint64_t{1} << static_cast<unsigned>(bits)) - 1;
    std::uint64_t stream = 0;
    int filled = 0;
    for (std::int64_t i = 0; i < kRun; ++i) {
        if (filled < bits) {
            stream |= std::uint64_t{static_cast<std::uint32_t>(*words)} << static_cast<unsigned>(filled);
            words += stride;
            filled += 32;
        }
        codes[i] = static_cast<std::uint8_t>(stream & mask);
        stream >>= static_cast<unsigned>(bits);
        filled -= bits;
    }
}

}  // namespace

void CpuBackend::pack(ConstTensorView codes, int bits, TensorView packed) {
    require_packing(codes, bits, packed, "pack");
    const std::int64_t rows = codes.extent(0);
    const std::int64_t columns = codes.extent(1);
    const auto* code = codes.data<std::uint8_t>();
    auto* words = packed.data<std::int32_t>();

#pragma omp parallel for schedule(static)
    for (std::int64_t begin = 0; begin < rows; begin += kRowBlock) {
        const std::int64_t end = std::min(begin + kRowBlock, rows);
        for (std::int64_t run = 0; run < columns / kRun; ++run) {
            for (std::int64_t row = begin; row < end; ++row) {
                pack_run(code + row * columns + run * kRun, bits, words + run * bits * rows + row, rows);
            }
        }
    }
}

void CpuBackend::unpack(ConstTensorView packed, int bits, TensorView codes) {
    require_packing(codes, bits, packed, "unpack");
    const std::int64_t rows = codes.extent(0);
    const std::int64_t columns = codes.extent(1);
    const auto* words = packed.data<std::int32_t>();
    auto* code = codes.data<std::uint8_t>();

#pragma omp parallel for schedule(static)
    for (std::int64_t begin = 0; begin < rows; begin += kRowBlock) {
        const std::int64_t end = std::min(begin + kRowBlock, rows);
        for (std::int64_t run = 0; run < columns / kRun; ++run) {
            for (std::int64_t row = begin; row < end; ++row) {
                unpack_run(words + run * bits * rows + row, rows, bits, code + row * columns + run * kRun);
            }
        }
    }
}

}  // namespace quantmill
