#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/cpu/blas.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/tiles.h"
#include "kernels/shape_check.h"

namespace quantmill {
namespace {

// One tile of the triangle is one BLAS call; measured by bench_hessian.
std::int64_t triangle_tile(std::int64_t order) {
    return even_tile(order, std::clamp<std::int64_t>(order / 4, 288, 512));
}

// 2^e for each exponent: multiplying by it is exact and much cheaper than ldexp.
std::vector<double> powers_of_two(std::span<const std::int32_t> exponents, int sign) {
    std::vector<double> powers;
    powers.reserve(exponents.size());
    for (const std::int32_t exponent : exponents) powers.push_back(std::ldexp(1.0, sign * exponent));
    return powers;
}

// sums[j] += round(values[j] · power · powers[j]), j < count. Returns how many do not fit; they are left out.
std::int64_t add_row(const float* values, std::int64_t count, double power, const std::vector<double>& powers,
                     std::int64_t* sums) {
    std::int64_t misfits = 0;
    for (std::int64_t j = 0; j < count; ++j) {
        const double value = double{values[j]} * power * powers[j];
        const bool fits = std::abs(value) < 0x1p62;  // false for NaN too
        std::int64_t total = 0;
        if (fits && !__builtin_add_overflow(sums[j], std::llrint(value), &total)) {
            sums[j] = total;
        } else {
            ++misfits;
        }
    }
    return misfits;
}

void require_all_fit(std::int64_t misfits, std::string_view operation) {
    if (misfits == 0) return;
    throw InternalError(
        "{}: {} of the values are not finite or exceed the headroom of the fixed-point scales", operation,
        misfits);
}

// Begins of the triangle's tiles, the most expensive (off the diagonal) first so that threads end together.
std::vector<std::pair<std::int64_t, std::int64_t>> triangle_tiles(std::int64_t order, std::int64_t tile) {
    std::vector<std::pair<std::int64_t, std::int64_t>> tiles;
    for (std::int64_t i = 0; i < order; i += tile) {
        for (std::int64_t j = 0; j < i; j += tile) tiles.emplace_back(i, j);
    }
    for (std::int64_t i = 0; i < order; i += tile) tiles.emplace_back(i, i);
    return tiles;
}

}  // namespace

void CpuBackend::accumulate_hessian(ConstTensorView x, TensorView h) {
    const std::int64_t order = square_order(h, "accumulate_hessian");
    const std::int64_t tokens = x.shape().rank() == 2 ? x.extent(0) : 0;
    require_operands(is(x, DType::f32, {tokens, order}), "accumulate_hessian", {x, h});
    if (tokens == 0) return;
    const auto* x_data = x.data<float>();
    auto* h_data = h.data<float>();
    const std::int64_t tile = triangle_tile(order);
    const auto tiles = triangle_tiles(order, tile);

#pragma omp parallel for schedule(dynamic, 1)
    for (std::size_t index = 0; index < tiles.size(); ++index) {
        const auto [i, j] = tiles[index];
        const std::int64_t m = std::min(tile, order - i);
        const std::int64_t n = std::min(tile, order - j);
        float* block = h_data + i * order + j;
        if (i == j) {
            const auto size = static_cast<blasint>(n);
            const auto stride = static_cast<blasint>(order);
            cblas_ssyrk(CblasRowMajor, CblasLower, CblasTrans, size, static_cast<blasint>(tokens), 1.0F,
                        x_data + i, stride, 1.0F, block, stride);
        } else {
            sgemm(m, n, tokens, 1.0F, {x_data + i, order, true}, {x_data + j, order}, 1.0F, block, order);
        }
    }
}

std::vector<float> CpuBackend::read_diagonal(ConstTensorView h) {
    const std::int64_t order = square_order(h, "read_diagonal");
    const auto* h_data = h.data<float>();
    std::vector<float> values(static_cast<std::size_t>(order));
    for (std::int64_t i = 0; i < order; ++i) values[i] = h_data[i * order + i];
    return values;
}

void CpuBackend::write_diagonal(std::span<const float> values, TensorView h) {
    const std::int64_t order = square_order(h, "write_diagonal");
    require_length(values.size(), order, "write_diagonal");
    auto* h_data = h.data<float>();
    for (std::int64_t i = 0; i < order; ++i) h_data[i * order + i] = values[i];
}

void CpuBackend::add_fixed_point(ConstTensorView h, std::span<const std::int32_t> exponents, TensorView sum) {
    const std::int64_t order = square_order(h, "add_fixed_point");
    require_length(exponents.size(), order, "add_fixed_point");
    require_operands(is(sum, DType::i64, {order * (order + 1) / 2}), "add_fixed_point", {h, sum});
    const std::vector<double> powers = powers_of_two(exponents, 1);
    const auto* h_data = h.data<float>();
    auto* sum_data = sum.data<std::int64_t>();
    std::int64_t misfits = 0;

#pragma omp parallel for schedule(static, 16) reduction(+ : misfits)
    for (std::int64_t i = 0; i < order; ++i) {
        misfits += add_row(h_data + i * order, i + 1, powers[i], powers, sum_data + i * (i + 1) / 2);
    }
    require_all_fit(misfits, "add_fixed_point");
}

void CpuBackend::from_fixed_point(ConstTensorView sum, std::span<const std::int32_t> exponents, double factor,
                                  TensorView h) {
    const std::int64_t order = square_order(h, "from_fixed_point");
    require_length(exponents.size(), order, "from_fixed_point");
    require_operands(is(sum, DType::i64, {order * (order + 1) / 2}), "from_fixed_point", {sum, h});
    const std::vector<double> powers = powers_of_two(exponents, -1);
    const auto* sum_data = sum.data<std::int64_t>();
    auto* h_data = h.data<float>();

#pragma omp parallel for schedule(static, 16)
    for (std::int64_t i = 0; i < order; ++i) {
        const std::int64_t* row = sum_data + i * (i + 1) / 2;
        for (std::int64_t j = 0; j <= i; ++j) {
            const double value = factor * static_cast<double>(row[j]) * powers[i] * powers[j];
            h_data[i * order + j] = static_cast<float>(value);
        }
    }
}

void CpuBackend::permute_symmetric(ConstTensorView source, std::span<const std::int32_t> order,
                                   TensorView h) {
    const std::int64_t n = square_order(h, "permute_symmetric");
    require_length(order.size(), n, "permute_symmetric");
    require_operands(is(source, DType::f32, {n, n}) && source.bytes() != h.bytes(), "permute_symmetric",
                     {source, h});
    const auto* source_data = source.data<float>();
    auto* h_data = h.data<float>();

#pragma omp parallel for schedule(static, 16)
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) {
            const std::int64_t row = std::max(order[i], order[j]);
            const std::int64_t column = std::min(order[i], order[j]);
            h_data[i * n + j] = source_data[row * n + column];
        }
    }
}

void CpuBackend::accumulate_cross(TensorView original, ConstTensorView x, TensorView d) {
    const std::int64_t order = square_order(d, "accumulate_cross");
    const std::int64_t tokens = x.shape().rank() == 2 ? x.extent(0) : 0;
    require_operands(is(x, DType::f32, {tokens, order}) && is(original, DType::f32, {tokens, order}),
                     "accumulate_cross", {original, x, d});
    if (tokens == 0) return;
    const auto* x_data = x.data<float>();
    auto* difference = original.data<float>();
    auto* d_data = d.data<float>();
    const std::int64_t tile = triangle_tile(order);

#pragma omp parallel for schedule(static)
    for (std::int64_t i = 0; i < tokens * order; ++i) difference[i] -= x_data[i];
#pragma omp parallel for schedule(dynamic, 1) collapse(2)
    for (std::int64_t i = 0; i < order; i += tile) {
        for (std::int64_t j = 0; j < order; j += tile) {
            sgemm(std::min(tile, order - i), std::min(tile, order - j), tokens, 1.0F,
                  {difference + i, order, true}, {x_data + j, order}, 1.0F, d_data + i * order + j, order);
        }
    }
}

double CpuBackend::largest_fixed_point(ConstTensorView d, std::span<const std::int32_t> exponents) {
    const std::int64_t order = square_order(d, "largest_fixed_point");
    require_length(exponents.size(), order, "largest_fixed_point");
    const std::vector<double> powers = powers_of_two(exponents, 1);
    const auto* data = d.data<float>();
    double largest = 0.0;

#pragma omp parallel for schedule(static, 16) reduction(max : largest)
    for (std::int64_t i = 0; i < order; ++i) {
        for (std::int64_t j = 0; j < order; ++j) {
            const double value = std::abs(double{data[i * order + j]}) * powers[i] * powers[j];
            largest = value <= largest ? largest : value;
            if (std::isnan(value)) largest = std::numeric_limits<double>::infinity();
        }
    }
    return largest;
}

void CpuBackend::add_fixed_point_full(ConstTensorView d, std::span<const std::int32_t> exponents,
                                      TensorView sum) {
    const std::int64_t order = square_order(d, "add_fixed_point_full");
    require_length(exponents.size(), order, "add_fixed_point_full");
    require_operands(is(sum, DType::i64, {order, order}), "add_fixed_point_full", {d, sum});
    const std::vector<double> powers = powers_of_two(exponents, 1);
    const auto* d_data = d.data<float>();
    auto* sum_data = sum.data<std::int64_t>();
    std::int64_t misfits = 0;

#pragma omp parallel for schedule(static, 16) reduction(+ : misfits)
    for (std::int64_t i = 0; i < order; ++i) {
        misfits += add_row(d_data + i * order, order, powers[i], powers, sum_data + i * order);
    }
    require_all_fit(misfits, "add_fixed_point_full");
}

void CpuBackend::from_fixed_point_full(ConstTensorView sum, std::span<const std::int32_t> exponents,
                                       double factor, TensorView d) {
    const std::int64_t order = square_order(d, "from_fixed_point_full");
    require_length(exponents.size(), order, "from_fixed_point_full");
    require_operands(is(sum, DType::i64, {order, order}), "from_fixed_point_full", {sum, d});
    const std::vector<double> powers = powers_of_two(exponents, -1);
    const auto* sum_data = sum.data<std::int64_t>();
    auto* d_data = d.data<float>();

#pragma omp parallel for schedule(static, 16)
    for (std::int64_t i = 0; i < order; ++i) {
        for (std::int64_t j = 0; j < order; ++j) {
            const double value =
                factor * static_cast<double>(sum_data[i * order + j]) * powers[i] * powers[j];
            d_data[i * order + j] = static_cast<float>(value);
        }
    }
}

}  // namespace quantmill
