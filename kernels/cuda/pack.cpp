#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/shape_check.h"

namespace quantmill {

void CudaBackend::pack(ConstTensorView codes, int bits, TensorView packed) {
    require_packing(codes, bits, packed, "pack");
    if (codes.shape().count() == 0) return;
    cuda::pack(reinterpret_cast<const std::uint8_t*>(codes.bytes()), codes.extent(0), codes.extent(1), bits,
               reinterpret_cast<std::int32_t*>(packed.bytes()), stream_);
}

void CudaBackend::unpack(ConstTensorView packed, int bits, TensorView codes) {
    require_packing(codes, bits, packed, "unpack");
    if (codes.shape().count() == 0) return;
    cuda::unpack(reinterpret_cast<const std::int32_t*>(packed.bytes()), codes.extent(0), codes.extent(1),
                 bits, reinterpret_cast<std::uint8_t*>(codes.bytes()), stream_);
}

}  // namespace quantmill
