// Our factorization beside cuSOLVER's potrf of the same matrix on the same card. potrf finds H = L·Lᵀ, which
// is as much work; to reverse the order of rows and columns, as GPTQ needs it, would come on top of its time.
#include <cusolverDn.h>

#include "bench/cuda/problem.h"

namespace quantmill::bench {
namespace {

void require(cusolverStatus_t status, const char* call) {
    if (status != CUSOLVER_STATUS_SUCCESS) {
        throw InfrastructureError("{} failed: status {}", call, static_cast<int>(status));
    }
}

// cusolverDnXpotrf in place. A row-major lower triangle is a column-major upper one: H = Uᵀ·U, U = Lᵀ.
class Potrf {
public:
    Potrf(CudaBench& bench, Tensor& h) : data_(h.view().bytes()), order_(h.shape()[0]) {
        require(cusolverDnCreate(&handle_), "cusolverDnCreate");
        require(cusolverDnSetStream(handle_, bench.backend().stream()), "cusolverDnSetStream");
        std::size_t device_bytes = 0;
        std::size_t host_bytes = 0;
        require(cusolverDnXpotrf_bufferSize(handle_, nullptr, CUBLAS_FILL_MODE_UPPER, order_, CUDA_R_32F,
                                            data_, order_, CUDA_R_32F, &device_bytes, &host_bytes),
                "cusolverDnXpotrf_bufferSize");
        workspace_ = bench.empty({static_cast<std::int64_t>(device_bytes)}, DType::u8);
        info_ = bench.empty({1}, DType::i32);
        host_.resize(host_bytes);
    }
    ~Potrf() { cusolverDnDestroy(handle_); }
    Potrf(const Potrf&) = delete;
    Potrf& operator=(const Potrf&) = delete;

    void run() {
        require(cusolverDnXpotrf(handle_, nullptr, CUBLAS_FILL_MODE_UPPER, order_, CUDA_R_32F, data_, order_,
                                 CUDA_R_32F, workspace_.view().bytes(), workspace_.view().size_bytes(),
                                 host_.data(), host_.size(), reinterpret_cast<int*>(info_.view().bytes())),
                "cusolverDnXpotrf");
    }

private:
    void* data_;
    std::int64_t order_;
    cusolverDnHandle_t handle_ = nullptr;
    Tensor workspace_, info_;
    std::vector<std::byte> host_;
};

// ‖L·Lᵀ·v − H·v‖ / ‖H·v‖ for one random v, in double; lower triangles.
double potrf_error(const std::vector<float>& h, const std::vector<float>& factor, std::int64_t n) {
    std::vector<double> v(n), hv(n, 0.0), ltv(n, 0.0);
    for (std::int64_t i = 0; i < n; ++i) v[i] = CudaBench::noise(5, i);
    for (std::int64_t i = 0; i < n; ++i) {
        const float* row = h.data() + i * n;
        const float* l = factor.data() + i * n;
        for (std::int64_t j = 0; j <= i; ++j) {
            hv[i] += row[j] * v[j];
            if (j < i) hv[j] += row[j] * v[i];
            ltv[j] += l[j] * v[i];
        }
    }
    double error = 0.0;
    double norm = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
        double sum = 0.0;
        for (std::int64_t j = 0; j <= i; ++j) sum += factor[i * n + j] * ltv[j];
        error += std::pow(sum - hv[i], 2);
        norm += hv[i] * hv[i];
    }
    return std::sqrt(error / norm);
}

void compare(CudaBench& bench, std::int64_t n) {
    const std::string shape = fmt::format("n={}", n);
    if (!bench.wanted("potrf", shape)) return;
    CudaBackend& backend = bench.backend();
    const Tensor h = make_hessian(bench, n);
    Tensor factor = bench.empty({n, n}, DType::f32);
    const auto restore = [&] { backend.copy(h, factor); };
    const double work = std::pow(n, 3) / 3;
    restore();
    if (!backend.reverse_cholesky(factor)) throw InternalError("the factorization of n={} failed", n);
    const std::vector<float> host = bench.get(h);
    const double error = factor_error(host, bench.get(factor), n);
    bench.measure(
        {"ours", shape, work, Unit::flop, error, 1e-4},
        [&] { static_cast<void>(backend.reverse_cholesky(factor)); }, restore);
    Potrf potrf(bench, factor);
    restore();
    potrf.run();
    const double potrf_wrong = potrf_error(host, bench.get(factor), n);
    bench.measure(
        {"cuSOLVER potrf", shape, work, Unit::flop, potrf_wrong, 1e-4}, [&] { potrf.run(); }, restore);
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) {
    using namespace quantmill::bench;
    return run_cuda_bench(argc, argv, "reverse Cholesky beside cuSOLVER", [](CudaBench& bench) {
        for (const std::int64_t n : {2048, 4096, 8192, 28672}) compare(bench, n);
    });
}
