// The reverse Cholesky factorization, C³/3 operations; checked by its residual on random vectors:
// |R·(Rᵀ·v) − H·v| relative to |H·v|.
#include "bench/bench_common.h"

namespace quantmill::bench {
namespace {

// XᵀX / T + 0.05: as badly conditioned as a damped Hessian of few tokens.
Tensor make_hessian(Bench& bench, std::int64_t order) {
    const std::int64_t tokens = order / 2;
    const Tensor x = bench.normal({tokens, order}, 1.0F / std::sqrt(static_cast<float>(tokens)));
    Tensor h = bench.empty({order, order});
    bench.backend().zero(h);
    bench.backend().accumulate_hessian(x, h);
    std::vector<float> diagonal = bench.backend().read_diagonal(h);
    for (float& value : diagonal) value += 0.05F;
    bench.backend().write_diagonal(diagonal, h);
    return h;
}

double residual(Bench& bench, const Tensor& hessian, const Tensor& factor) {
    const std::int64_t order = hessian.shape()[0];
    const auto n = static_cast<std::size_t>(order);
    const float* h = hessian.view().data<float>();
    const float* f = factor.view().data<float>();
    const auto r = [&](std::int64_t i, std::int64_t j) {
        const double diagonal = f[j * order + j];
        return i == j ? diagonal : double{f[i * order + j]} * diagonal;
    };
    std::vector<double> v(n);
    for (double& value : v) value = static_cast<double>(bench.integer(2001)) / 1000 - 1;
    std::vector<double> product(n, 0.0);     // H·v
    std::vector<double> transposed(n, 0.0);  // Rᵀ·v
    for (std::int64_t i = 0; i < order; ++i) {
        for (std::int64_t j = 0; j < order; ++j) {
            product[i] += double{h[std::max(i, j) * order + std::min(i, j)]} * v[j];
            if (i <= j) transposed[j] += r(i, j) * v[i];
        }
    }
    double difference = 0.0;
    double norm = 0.0;
    for (std::int64_t i = 0; i < order; ++i) {
        double value = 0.0;
        for (std::int64_t j = i; j < order; ++j) value += r(i, j) * transposed[j];
        difference += std::pow(value - product[i], 2);
        norm += std::pow(product[i], 2);
    }
    return std::sqrt(difference / norm);
}

void factor(Bench& bench, std::int64_t order) {
    const std::string shape = fmt::format("C={}", order);
    if (!bench.wanted("reverse_cholesky", shape)) return;
    const Tensor h = make_hessian(bench, order);
    Tensor work = bench.empty({order, order});
    bool positive = true;
    const auto run = [&] {
        bench.backend().copy(h, work);  // C²: small beside the factorization
        positive = bench.backend().reverse_cholesky(work) && positive;
    };
    run();
    const double error = positive ? residual(bench, h, work) : INFINITY;
    bench.measure({"reverse_cholesky", shape, std::pow(order, 3) / 3, Unit::flop, error, 2e-5}, run);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_bench(argc, argv, "reverse Cholesky factorization", [](Bench& bench) {
        factor(bench, 576);
        factor(bench, 1536);
        factor(bench, 4096);
        factor(bench, 8192);
    });
}
