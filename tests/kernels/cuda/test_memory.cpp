#include <string>

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

TEST_F(Memory, copies) {
    const std::vector<float> values = normal(1000);
    const Tensor a = put(cuda(), values, {1000});
    Tensor b = poisoned(cuda(), {10, 100}, DType::f32);
    cuda().copy(a, b);
    EXPECT_EQ(get<float>(b), values);
    EXPECT_GT(cuda().free_memory(), 0U);
    EXPECT_FALSE(cuda().description().empty());
}

}  // namespace
}  // namespace quantmill::testing
