#include "kernels/cuda/check.h"

#include <string>
#include <string_view>

#include "kernels/error.h"

namespace quantmill::cuda {
namespace {

std::string device_text() {
    int device = -1;
    cudaDeviceProp properties{};
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
        return "an unknown CUDA device";
    }
    return fmt::format("CUDA device {} ({})", device, properties.name);
}

[[noreturn]] void fail(std::string_view call, std::initializer_list<Argument> arguments,
                       std::string_view status) {
    std::string list;
    for (const Argument& argument : arguments) {
        list += fmt::format("{}{}={}", list.empty() ? "" : ", ", argument.name, argument.value);
    }
    throw InfrastructureError("{}({}) failed on {}: {}", call, list, device_text(), status);
}

}  // namespace

void check(cudaError_t status, const char* call, std::initializer_list<Argument> arguments) {
    if (status == cudaSuccess) return;
    fail(call, arguments, fmt::format("{} ({})", cudaGetErrorName(status), cudaGetErrorString(status)));
}

void check(cublasStatus_t status, const char* call, std::initializer_list<Argument> arguments) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail(call, arguments,
             fmt::format("{} ({})", cublasLtGetStatusName(status), cublasLtGetStatusString(status)));
}

void check_launch(const char* kernel, dim3 grid, dim3 block) {
    check(cudaGetLastError(), kernel,
          {{"grid.x", grid.x}, {"grid.y", grid.y}, {"grid.z", grid.z}, {"threads", block.x}});
}

}  // namespace quantmill::cuda
