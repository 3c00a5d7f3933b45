#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <initializer_list>

namespace quantmill::cuda {

struct Argument {
    const char* name;
    long long value;
};

// Throw InfrastructureError with the call, its arguments, the status and the device unless the
// status is success.
void check(cudaError_t status, const char* call, std::initializer_list<Argument> arguments = {});
void check(cublasStatus_t status, const char* call, std::initializer_list<Argument> arguments = {});
// Stands after every kernel launch.
void check_launch(const char* kernel, dim3 grid, dim3 block);

}  // namespace quantmill::cuda
