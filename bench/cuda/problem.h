#pragma once

#include "bench/cuda/cuda_bench.h"

namespace quantmill::bench {

// A damped Hessian (lower triangle) of n columns that differ in size up to 30 times and lean on their
// neighbours, from as many tokens as columns.
inline Tensor make_hessian(CudaBench& bench, std::int64_t n) {
    CudaBackend& backend = bench.backend();
    Tensor h = bench.empty({n, n}, DType::f32);
    backend.zero(h);
    constexpr std::int64_t kChunk = 4096;
    for (std::int64_t token = 0; token < n; token += kChunk) {
        const std::int64_t tokens = std::min(kChunk, n - token);
        const std::vector<float> x = CudaBench::generate(tokens * n, [&](std::int64_t i) {
            const std::int64_t column = i % n;
            const std::int64_t place = token * n + i;
            const float size = column % 997 == 5 ? 6.0F : 0.2F + 0.1F * static_cast<float>(column % 11);
            return size * (CudaBench::noise(77, place) + 0.7F * CudaBench::noise(77, place - 1));
        });
        backend.accumulate_hessian(bench.put(x, {tokens, n}, DType::bf16), h);
    }
    std::vector<float> diagonal = backend.read_diagonal(h);
    double mean = 0.0;
    for (const float value : diagonal) mean += value / static_cast<double>(n);
    for (float& value : diagonal) value += static_cast<float>(0.05 * mean);
    backend.write_diagonal(diagonal, h);
    return h;
}

// ‖R·Rᵀ·v − H·v‖ / ‖H·v‖ for one random v, in double.
inline double factor_error(const std::vector<float>& h, const std::vector<float>& factor, std::int64_t n) {
    std::vector<double> v(n), hv(n, 0.0), rtv(n, 0.0), rrtv(n, 0.0);
    for (std::int64_t i = 0; i < n; ++i) v[i] = CudaBench::noise(5, i);
#pragma omp parallel
    {
        std::vector<double> mine(n, 0.0);
        std::vector<double> push(n, 0.0);
#pragma omp for schedule(dynamic, 64)
        for (std::int64_t i = 0; i < n; ++i) {
            const float* row = h.data() + i * n;
            double sum = row[i] * v[i];
            for (std::int64_t j = 0; j < i; ++j) {
                sum += row[j] * v[j];
                mine[j] += row[j] * v[i];
            }
            mine[i] += sum;
            const float* c = factor.data() + i * n;  // C_ij = R_ij / R_jj, R_jj on the diagonal
            push[i] += v[i];
            for (std::int64_t j = i + 1; j < n; ++j) push[j] += c[j] * v[i];
        }
#pragma omp critical
        for (std::int64_t i = 0; i < n; ++i) {
            hv[i] += mine[i];
            rtv[i] += push[i];
        }
    }
    // rtv is Cᵀv with a unit diagonal; Rᵀv scales it by R_jj, and R takes the factor once more.
#pragma omp parallel for schedule(dynamic, 64)
    for (std::int64_t i = 0; i < n; ++i) {
        double sum = 0.0;
        for (std::int64_t j = i; j < n; ++j) {
            const double pivot = factor[j * n + j];
            sum += (i == j ? 1.0 : double{factor[i * n + j]}) * pivot * pivot * rtv[j];
        }
        rrtv[i] = sum;
    }
    double error = 0.0;
    double norm = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
        error += std::pow(rrtv[i] - hv[i], 2);
        norm += hv[i] * hv[i];
    }
    return std::sqrt(error / norm);
}

}  // namespace quantmill::bench
