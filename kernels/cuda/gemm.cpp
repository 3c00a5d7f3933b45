#include "kernels/cuda/gemm.h"

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/error.h"

namespace quantmill::cuda {
namespace {

constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20U;
// Stands for any number of rows when an algorithm is chosen for rows that vary.
constexpr std::int64_t kNominalRows = 8192;

// cuBLASLt is column-major, so it computes Dᵀ = Yᵀ · Xᵀ: its A is our Y and its B is our X.
struct Descriptors {
    cublasLtMatmulDescOpaque_t operation{};
    cublasLtMatrixLayoutOpaque_t a{}, b{}, d{};
};

void set(cublasLtMatmulDesc_t descriptor, cublasLtMatmulDescAttributes_t attribute, int value) {
    check(cublasLtMatmulDescSetAttribute(descriptor, attribute, &value, sizeof(value)),
          "cublasLtMatmulDescSetAttribute", {{"attribute", attribute}, {"value", value}});
}

void layout(cublasLtMatrixLayout_t descriptor, cudaDataType_t type, std::int64_t inner, std::int64_t outer,
            std::int64_t ld, std::int64_t count, std::int64_t step) {
    check(cublasLtMatrixLayoutInit(descriptor, type, static_cast<std::uint64_t>(inner),
                                   static_cast<std::uint64_t>(outer), ld),
          "cublasLtMatrixLayoutInit", {{"rows", inner}, {"columns", outer}, {"ld", ld}});
    const auto matrices = static_cast<std::int32_t>(count);
    check(cublasLtMatrixLayoutSetAttribute(descriptor, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &matrices,
                                           sizeof(matrices)),
          "cublasLtMatrixLayoutSetAttribute", {{"batch count", count}});
    check(cublasLtMatrixLayoutSetAttribute(descriptor, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step,
                                           sizeof(step)),
          "cublasLtMatrixLayoutSetAttribute", {{"batch offset", step}});
}

Descriptors describe(const Product& p, std::int64_t rows) {
    Descriptors result;
    check(cublasLtMatmulDescInit(&result.operation, p.compute, CUDA_R_32F), "cublasLtMatmulDescInit");
    set(&result.operation, CUBLASLT_MATMUL_DESC_TRANSA, p.y_by_columns ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(&result.operation, CUBLASLT_MATMUL_DESC_TRANSB, p.x_by_depth ? CUBLAS_OP_T : CUBLAS_OP_N);
    layout(&result.a, p.input, p.y_by_columns ? p.depth : p.columns, p.y_by_columns ? p.columns : p.depth,
           p.ldy, p.count, p.step_y);
    layout(&result.b, p.input, p.x_by_depth ? rows : p.depth, p.x_by_depth ? p.depth : rows, p.ldx, p.count,
           p.step_x);
    layout(&result.d, p.output, p.columns, rows, p.ldd, p.count, p.step_d);
    return result;
}

std::int64_t size_of(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

// What a kernel may assume of every row's address; the largest that makes a difference is 16 bytes.
std::uint32_t alignment_of(const void* data, std::int64_t ld, cudaDataType_t type) {
    const auto bits =
        reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(ld * size_of(type)) | 16U;
    return static_cast<std::uint32_t>(bits & (~bits + 1));
}

}  // namespace

Gemm::Gemm() {
    check(cublasLtCreate(&handle_), "cublasLtCreate");
    check(cudaMalloc(&workspace_, kWorkspaceBytes), "cudaMalloc for cuBLASLt's workspace",
          {{"bytes", static_cast<long long>(kWorkspaceBytes)}});
}

Gemm::~Gemm() {
    cudaFree(workspace_);
    cublasLtDestroy(handle_);
}

void Gemm::run(const Product& p, const Operands& operands, cudaStream_t stream) {
    if (p.rows == 0 || p.columns == 0) return;
    const std::array<std::uint32_t, 4> alignment = {
        alignment_of(operands.y, p.ldy, p.input), alignment_of(operands.x, p.ldx, p.input),
        alignment_of(operands.c, p.ldd, p.output), alignment_of(operands.d, p.ldd, p.output)};
    const Key key = {p.input,      p.output,     p.compute,      p.rows_vary ? -1 : p.rows,
                     p.columns,    p.depth,      p.ldx,          p.ldy,
                     p.ldd,        p.x_by_depth, p.y_by_columns, p.beta == 0.0F,
                     alignment[0], alignment[1], alignment[2],   alignment[3],
                     p.count,      p.step_x,     p.step_y,       p.step_d};
    auto found = algorithms_.find(key);
    if (found == algorithms_.end()) found = algorithms_.emplace(key, choose(p, alignment)).first;

    Descriptors descriptors = describe(p, p.rows);
    check(cublasLtMatmul(handle_, &descriptors.operation, &p.alpha, operands.y, &descriptors.a, operands.x,
                         &descriptors.b, &p.beta, operands.c, &descriptors.d, operands.d, &descriptors.d,
                         &found->second, workspace_, kWorkspaceBytes, stream),
          "cublasLtMatmul",
          {{"rows", p.rows},
           {"columns", p.columns},
           {"depth", p.depth},
           {"ldx", p.ldx},
           {"ldy", p.ldy},
           {"ldd", p.ldd},
           {"input", p.input},
           {"compute", p.compute}});
}

cublasLtMatmulAlgo_t Gemm::choose(const Product& p, const std::array<std::uint32_t, 4>& alignment) {
    Descriptors descriptors = describe(p, p.rows_vary ? kNominalRows : p.rows);
    cublasLtMatmulPreferenceOpaque_t preference{};
    check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)),
              "cublasLtMatmulPreferenceSetAttribute", {{"attribute", attribute}});
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment[0]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment[1]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment[2]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment[3]);

    cublasLtMatmulHeuristicResult_t result{};
    int count = 0;
    check(cublasLtMatmulAlgoGetHeuristic(handle_, &descriptors.operation, &descriptors.a, &descriptors.b,
                                         &descriptors.d, &descriptors.d, &preference, 1, &result, &count),
          "cublasLtMatmulAlgoGetHeuristic",
          {{"rows", p.rows},
           {"columns", p.columns},
           {"depth", p.depth},
           {"ldx", p.ldx},
           {"ldy", p.ldy},
           {"ldd", p.ldd},
           {"input", p.input},
           {"compute", p.compute}});
    if (count == 0) throw InternalError("cuBLASLt knows no algorithm for a product");
    return result.algo;
}

}  // namespace quantmill::cuda
