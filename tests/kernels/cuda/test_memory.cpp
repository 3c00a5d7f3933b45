#include <algorithm>
#include <string>

#include "kernels/cuda/check.h"
#include "tests/kernels/cuda/fixture.h"

namespace quantmill::testing {
namespace {

using Memory = CudaTest;

TEST_F(Memory, out_of_memory_names_the_allocation_and_what_is_held) {
    const Tensor held = cuda().empty({1 << 20}, DType::f32, "a tensor that is held");
    try {
        const Tensor huge = cuda().empty({std::int64_t{1} << 45}, DType::u8, "a huge tensor");
        FAIL() << "32 TiB were found";
    } catch (const InfrastructureError& error) {
        const std::string message = error.what();
        EXPECT_NE(message.find("a huge tensor"), std::string::npos) << message;
        EXPECT_NE(message.find("a tensor that is held 4194304"), std::string::npos) << message;
        EXPECT_NE(message.find("compute.device_memory"), std::string::npos) << message;
    }
    Tensor after = cuda().empty({16}, DType::f32, "after");  // the backend is still usable
    cuda().zero(after);
    EXPECT_EQ(get<float>(after), std::vector<float>(16, 0.0F));
}

TEST_F(Memory, failed_calls_are_named_with_arguments_status_and_device) {
    const auto message = [](const auto& call) {
        try {
            call();
        } catch (const InfrastructureError& error) {
            return std::string(error.what());
        }
        return std::string("nothing was thrown");
    };
    const std::string device = "CUDA device 0 (";
    const std::string cublas = message(
        [] { cuda::check(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmul", {{"rows", 3}, {"depth", 5}}); });
    EXPECT_EQ(cublas.find("cublasLtMatmul(rows=3, depth=5) failed on " + device), 0U) << cublas;
    EXPECT_NE(cublas.find("CUBLAS_STATUS_NOT_SUPPORTED"), std::string::npos) << cublas;
    const std::string runtime =
        message([] { cuda::check(cudaSetDevice(1 << 20), "cudaSetDevice", {{"device", 1 << 20}}); });
    EXPECT_EQ(runtime.find("cudaSetDevice(device=1048576) failed on " + device), 0U) << runtime;
    EXPECT_NE(runtime.find("cudaErrorInvalidDevice"), std::string::npos) << runtime;
    static_cast<void>(cudaGetLastError());
}

TEST_F(Memory, copies) {
    const std::vector<float> values = normal(1000);
    const Tensor a = put(cuda(), values, {1000});
    Tensor b = poisoned(cuda(), {10, 100}, DType::f32);
    cuda().copy(a, b);
    EXPECT_EQ(get<float>(b), values);
    EXPECT_GT(cuda().free_memory(1), 0U);
    EXPECT_FALSE(cuda().description().empty());
}

TEST_F(Memory, a_limit_holds) {
    constexpr std::size_t kLimit = std::size_t{256} << 20U;
    CudaBackend limited(0, kLimit);
    EXPECT_LE(limited.free_memory(1), kLimit);
    {
        const Tensor most = limited.empty({200 << 20}, DType::u8, "most of it");
        EXPECT_LE(limited.free_memory(1), kLimit - (std::size_t{200} << 20U));
        EXPECT_THROW(static_cast<void>(limited.empty({100 << 20}, DType::u8, "too much")),
                     InfrastructureError);
    }
    const Tensor again = limited.empty({240 << 20}, DType::u8, "what was freed");
    EXPECT_GE(limited.peak_memory(), std::size_t{240} << 20U);
    EXPECT_LE(limited.peak_memory(), kLimit);
}

// Keeps the stream busy for some milliseconds.
void keep_busy(CudaBackend& backend, const Tensor& square, Tensor& out) {
    for (int i = 0; i < 20; ++i) backend.linear(square, square, {}, out);
}

TEST_F(Memory, lanes_wait_for_what_they_are_told_to) {
    constexpr std::int64_t kOrder = 4096;
    const Tensor square =
        put(cuda(), std::vector<float>(kOrder * kOrder, 0.01F), {kOrder, kOrder}, DType::bf16);
    Tensor out = cuda().empty({kOrder, kOrder}, DType::f32, "products");
    const auto lane = cuda().make_copy_lane();
    const std::vector<float> ones(1 << 20, 1.0F);
    const HostBuffer host = cuda().host_buffer(ones.size() * sizeof(float), "a test");
    Tensor x = poisoned(cuda(), {1 << 20}, DType::f32);
    for (int round = 0; round < 5; ++round) {
        const auto value = static_cast<float>(round + 1);
        // The upload must follow the work before it, and be there for the work after it.
        std::fill_n(reinterpret_cast<float*>(host.data()), ones.size(), value);
        keep_busy(cuda(), square, out);
        lane->after(*cuda().record());
        lane->upload(host.data(), x);
        cuda().after(*lane->record());
        Tensor copy = cuda().empty(x.shape(), DType::f32, "a copy");
        cuda().copy(x, copy);
        ASSERT_EQ(get<float>(copy), std::vector<float>(ones.size(), value));
        // The download must see what work before it made.
        keep_busy(cuda(), square, out);
        cuda().zero(x);
        lane->after(*cuda().record());
        lane->download(x, host.data());
        lane->record()->wait();
        const auto* got = reinterpret_cast<const float*>(host.data());
        ASSERT_EQ(std::vector<float>(got, got + ones.size()), std::vector<float>(ones.size(), 0.0F));
    }
}

TEST_F(Memory, events_measure_the_device) {
    constexpr std::int64_t kOrder = 4096;
    const Tensor square =
        put(cuda(), std::vector<float>(kOrder * kOrder, 0.01F), {kOrder, kOrder}, DType::bf16);
    Tensor out = cuda().empty({kOrder, kOrder}, DType::f32, "products");
    keep_busy(cuda(), square, out);
    const EventPtr begin = cuda().record();
    keep_busy(cuda(), square, out);
    const EventPtr end = cuda().record();
    // 20 products of 2·4096³ operations: no GPU of today does them in half a millisecond.
    EXPECT_GT(end->seconds_since(*begin), 5e-4);
    EXPECT_LT(end->seconds_since(*begin), 10.0);
}

TEST_F(Memory, pinned_memory_is_used_again) {
    const std::byte* first = nullptr;
    {
        const HostBuffer buffer = cuda().host_buffer(12345, "a test");
        first = buffer.data();
    }
    const HostBuffer other = cuda().host_buffer(12346, "another size");
    const HostBuffer same = cuda().host_buffer(12345, "the same size");
    EXPECT_EQ(same.data(), first);
    EXPECT_NE(other.data(), first);
}

}  // namespace
}  // namespace quantmill::testing
