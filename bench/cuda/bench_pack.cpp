// Packing, unpacking and decoding of quantized weights; what is packed must unpack to itself.
#include "bench/cuda/cuda_bench.h"

namespace quantmill::bench {
namespace {

void pack(CudaBench& bench, std::int64_t rows, std::int64_t columns, int bits) {
    CudaBackend& backend = bench.backend();
    const std::string shape = fmt::format("{} x {}, {} bits", rows, columns, bits);
    if (!bench.wanted("pack", shape)) return;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(rows * columns));
    for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] =
            static_cast<std::uint8_t>((i * 2654435761U >> 9U) & ((1U << static_cast<unsigned>(bits)) - 1));
    }
    Tensor source = bench.empty({rows, columns}, DType::u8);
    Tensor packed = bench.empty({columns * bits / 32, rows}, DType::i32);
    Tensor unpacked = bench.empty({rows, columns}, DType::u8);
    backend.copy_from_host(codes.data(), source);
    backend.pack(source, bits, packed);
    backend.unpack(packed, bits, unpacked);
    std::vector<std::uint8_t> back(codes.size());
    backend.copy_to_host(unpacked, back.data());
    const double error = back == codes ? 0.0 : 1.0;
    const double bytes = static_cast<double>(rows * columns) * (1.0 + bits / 8.0);
    bench.measure({"pack", shape, bytes, Unit::byte, error, 0.0},
                  [&] { backend.pack(source, bits, packed); });
    bench.measure({"unpack", shape, bytes, Unit::byte, error, 0.0},
                  [&] { backend.unpack(packed, bits, unpacked); });
    const Tensor scales = bench.random({rows, columns / 128}, DType::f16);
    Tensor zeros = bench.empty({rows, columns / 128}, DType::u8);
    backend.zero(zeros);
    std::vector<std::int32_t> g_idx(static_cast<std::size_t>(columns));
    for (std::int64_t c = 0; c < columns; ++c) g_idx[c] = static_cast<std::int32_t>(c / 128);
    Tensor decoded = bench.empty({rows, columns}, DType::bf16);
    const auto decode = [&] { backend.dequantize({source, scales, zeros}, g_idx, decoded); };
    decode();
    const std::vector<float> row = bench.get(ConstTensorView(decoded).rows(0, 1));
    const std::vector<float> steps = bench.get(ConstTensorView(scales).rows(0, 1));
    double worst = 0.0;
    for (std::int64_t c = 0; c < columns; ++c) {
        const float expected = to_float(to_bfloat16(steps[c / 128] * static_cast<float>(codes[c])));
        worst = std::max(worst, std::abs(double{row[c]} - double{expected}));
    }
    bench.measure({"dequantize", shape, 3.0 * static_cast<double>(rows * columns), Unit::byte, worst, 0.0},
                  decode);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_cuda_bench(argc, argv, "packing on one GPU", [](CudaBench& bench) {
        for (const int bits : {2, 3, 4, 8}) pack(bench, 28672, 8192, bits);
    });
}
