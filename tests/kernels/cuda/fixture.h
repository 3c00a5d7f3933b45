#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/half.h"

namespace quantmill::testing {

constexpr double kBf16Unit = 0x1p-8;   // relative error of one rounding to bf16
constexpr double kFp32Unit = 0x1p-24;  // and to fp32

// Both backends. Without a GPU a test is skipped and says so, unless QUANTMILL_REQUIRE_GPU is set.
class CudaTest : public ::testing::Test {
protected:
    static void SetUpTestSuite() {
        if (CudaBackend::visible_devices() > 0) cuda_ = std::make_unique<CudaBackend>(0);
        cpu_ = std::make_unique<CpuBackend>(4);
    }
    static void TearDownTestSuite() {
        cuda_.reset();
        cpu_.reset();
    }
    void SetUp() override {
        RecordProperty("seed", std::to_string(seed_));
        if (cuda_) return;
        if (std::getenv("QUANTMILL_REQUIRE_GPU") != nullptr) FAIL() << "no CUDA device is visible";
        GTEST_SKIP() << "no CUDA device is visible";
    }

    static CpuBackend& cpu() { return *cpu_; }
    static CudaBackend& cuda() { return *cuda_; }

    std::vector<float> normal(std::int64_t count, float scale = 1.0F) {
        std::normal_distribution<float> distribution(0.0F, scale);
        std::vector<float> values(static_cast<std::size_t>(count));
        for (float& value : values) value = distribution(random_);
        return values;
    }
    // Values that bf16 holds exactly, so both backends see the same numbers.
    std::vector<float> activations(std::int64_t count, float scale = 1.0F) {
        std::vector<float> values = normal(count, scale);
        for (float& value : values) value = to_float(to_bfloat16(value));
        return values;
    }
    std::int64_t integer(std::int64_t low, std::int64_t high) {
        return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
    }

    template <class T>
    static Tensor put(Backend& backend, const std::vector<T>& values, Shape shape,
                      DType dtype = dtype_of<T>) {
        Tensor tensor = backend.empty(shape, dtype_of<T>, "test");
        backend.copy_from_host(values.data(), tensor);
        if (dtype == dtype_of<T>) return tensor;
        Tensor converted = backend.empty(shape, dtype, "test");
        backend.convert(tensor, converted);
        return converted;
    }
    template <class T>
    static std::vector<T> get(ConstTensorView view) {
        std::vector<T> values(static_cast<std::size_t>(view.shape().count()));
        view.backend()->copy_to_host(view, values.data());
        return values;
    }
    static std::vector<float> get_floats(ConstTensorView view) {
        Tensor tensor = view.backend()->empty(view.shape(), DType::f32, "test");
        view.backend()->convert(view, tensor);
        return get<float>(tensor);
    }
    // A tensor full of NaN (or 255), so that an element nobody writes is seen.
    static Tensor poisoned(Backend& backend, Shape shape, DType dtype) {
        Tensor tensor = backend.empty(shape, dtype, "test");
        const std::vector<std::uint8_t> bytes(tensor.view().size_bytes(), 0xFF);
        backend.copy_from_host(bytes.data(), tensor);
        return tensor;
    }

    template <class Bound>
    static void expect_near(const std::vector<float>& actual, const std::vector<float>& expected,
                            Bound bound) {
        ASSERT_EQ(actual.size(), expected.size());
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < actual.size(); ++i) {
            const double error = std::abs(double{actual[i]} - double{expected[i]});
            if (error <= bound(i)) continue;  // NaN is not
            if (++wrong <= 3) {
                ADD_FAILURE() << "element " << i << ": " << actual[i] << " instead of " << expected[i]
                              << ", error " << error << ", bound " << bound(i);
            }
        }
        EXPECT_EQ(wrong, 0U) << "of " << actual.size();
    }

    // Shapes and numbers are the same in every run unless QUANTMILL_TEST_SEED says otherwise.
    static unsigned seed() {
        const char* text = std::getenv("QUANTMILL_TEST_SEED");
        return text == nullptr ? 20261123U : static_cast<unsigned>(std::strtoul(text, nullptr, 10));
    }
    unsigned seed_ = seed();
    std::mt19937 random_{seed_};

private:
    static inline std::unique_ptr<CpuBackend> cpu_;
    static inline std::unique_ptr<CudaBackend> cuda_;
};

}  // namespace quantmill::testing
