#pragma once

#include <cblas.h>

#include <cstdint>

namespace quantmill {

// A row-major operand of a product: its first element, the distance between rows, and whether it
// enters transposed.
struct Operand {
    const float* data;
    std::int64_t stride;
    bool transposed = false;
};

// c[m, n] = alpha · a[m, k] · b[k, n] + beta · c, row-major. Call it inside OpenMP parallel regions only:
// an OpenMP build of OpenBLAS starts threads of its own anywhere else.
inline void sgemm(std::int64_t m, std::int64_t n, std::int64_t k, float alpha, Operand a, Operand b,
                  float beta, float* c, std::int64_t c_stride) {
    const auto size = [](std::int64_t value) { return static_cast<blasint>(value); };
    const auto transposition = [](const Operand& x) { return x.transposed ? CblasTrans : CblasNoTrans; };
    cblas_sgemm(CblasRowMajor, transposition(a), transposition(b), size(m), size(n), size(k), alpha, a.data,
                size(a.stride), b.data, size(b.stride), beta, c, size(c_stride));
}

}  // namespace quantmill
