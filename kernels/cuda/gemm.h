#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>

namespace quantmill::cuda {

// D[rows, columns] = alpha · X · Y + beta · C; everything row-major, leading dimensions in elements.
struct Product {
    cudaDataType_t input = CUDA_R_32F;
    cudaDataType_t output = CUDA_R_32F;
    cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
    std::int64_t rows = 0, columns = 0, depth = 0;
    std::int64_t ldx = 0, ldy = 0, ldd = 0;  // C has D's leading dimension
    bool x_by_depth = false;                 // X is stored [depth, rows] instead of [rows, depth]
    bool y_by_columns = false;               // Y is stored [columns, depth] instead of [depth, columns]
    // Products of one shape at equal distances, in elements of X, Y and D.
    std::int64_t count = 1, step_x = 0, step_y = 0, step_d = 0;
    float alpha = 1.0F, beta = 0.0F;
    // Whether `rows` is a share of the job's rows: then the algorithm is chosen without looking at it.
    bool rows_vary = false;
};

struct Operands {
    const void* x;
    const void* y;
    const void* c;
    void* d;
};

// Matrix products with cuBLASLt. An algorithm is chosen once for a problem, without split sums, and
// then stays: the bits of an element do not depend on how many rows share the call.
class Gemm {
public:
    Gemm();
    ~Gemm();
    Gemm(const Gemm&) = delete;
    Gemm& operator=(const Gemm&) = delete;

    void run(const Product& product, const Operands& operands, cudaStream_t stream);

private:
    using Key = std::array<std::int64_t, 20>;
    cublasLtMatmulAlgo_t choose(const Product& product, const std::array<std::uint32_t, 4>& alignment);

    cublasLtHandle_t handle_ = nullptr;
    void* workspace_ = nullptr;
    std::map<Key, cublasLtMatmulAlgo_t> algorithms_;
};

}  // namespace quantmill::cuda
