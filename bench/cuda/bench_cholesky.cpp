// Reverse Cholesky factors; the error is ‖R·Rᵀ·v − H·v‖ / ‖H·v‖ in double.
#include "bench/cuda/problem.h"

namespace quantmill::bench {
namespace {

void cholesky(CudaBench& bench, std::int64_t n) {
    const std::string shape = fmt::format("n={}", n);
    if (!bench.wanted("cholesky", shape)) return;
    CudaBackend& backend = bench.backend();
    const Tensor h = make_hessian(bench, n);
    Tensor factor = bench.empty({n, n}, DType::f32);
    backend.copy(h, factor);
    if (!backend.reverse_cholesky(factor)) throw InternalError("the factorization of n={} failed", n);
    const double error = factor_error(bench.get(h), bench.get(factor), n);
    bench.measure(
        {"cholesky", shape, std::pow(n, 3) / 3, Unit::flop, error, 1e-4},
        [&] { static_cast<void>(backend.reverse_cholesky(factor)); }, [&] { backend.copy(h, factor); });
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_cuda_bench(argc, argv, "reverse Cholesky on one GPU", [](CudaBench& bench) {
        for (const std::int64_t n : {576, 1536, 2048, 4096, 8192, 14336, 28672}) cholesky(bench, n);
    });
}
