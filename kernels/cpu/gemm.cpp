#include <algorithm>
#include <cstdint>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/tiles.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

struct Tile {
    std::int64_t tokens;
    std::int64_t outputs;
};

// One tile is one BLAS call: large enough to pay for packing its operands (bench_gemm), but a small
// product still gives several cores something to do. Never depends on how many there are.
Tile choose_tile(std::int64_t tokens, std::int64_t outputs) {
    constexpr std::int64_t kEnough = 8;
    Tile tile{};
    for (const auto [token_limit, output_limit] : {Tile{512, 576}, Tile{512, 288}, Tile{256, 288}}) {
        tile = {even_tile(tokens, token_limit), even_tile(outputs, output_limit)};
        if (tile_count(tokens, tile.tokens) * tile_count(outputs, tile.outputs) >= kEnough) break;
    }
    return tile;
}

}  // namespace

void CpuBackend::linear(ConstTensorView x, ConstTensorView weight, ConstTensorView bias, TensorView out) {
    const bool ranks_fit = x.shape().rank() == 2 && weight.shape().rank() == 2;
    const std::int64_t tokens = ranks_fit ? x.extent(0) : 0;
    const std::int64_t columns = ranks_fit ? x.extent(1) : 0;
    const std::int64_t outputs = ranks_fit ? weight.extent(0) : 0;
    require_operands(
        ranks_fit && is(x, DType::f32, {tokens, columns}) && is(weight, DType::f32, {outputs, columns}) &&
            (bias.empty() || is(bias, DType::f32, {outputs})) && is(out, DType::f32, {tokens, outputs}),
        "linear", {x, weight, bias, out});
    const auto* x_data = x.data<float>();
    const auto* w_data = weight.data<float>();
    const auto* bias_data = bias.empty() ? nullptr : bias.data<float>();
    auto* out_data = out.data<float>();
    const Tile tile = choose_tile(tokens, outputs);

#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (std::int64_t t = 0; t < tokens; t += tile.tokens) {
        for (std::int64_t r = 0; r < outputs; r += tile.outputs) {
            const std::int64_t m = std::min(tile.tokens, tokens - t);
            const std::int64_t n = std::min(tile.outputs, outputs - r);
            float* block = out_data + t * outputs + r;
            if (bias_data != nullptr) {
                for (std::int64_t i = 0; i < m; ++i) {
                    std::copy_n(bias_data + r, n, block + i * outputs);
                }
            }
            sgemm(m, n, columns, 1.0F, {x_data + t * columns, columns}, {w_data + r * columns, columns, true},
                  bias_data != nullptr ? 1.0F : 0.0F, block, outputs);
        }
    }
}

}  // namespace quantmill
