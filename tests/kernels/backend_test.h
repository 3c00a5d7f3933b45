#pragma once

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/half.h"
#include "kernels/make_backend.h"

namespace quantmill::testing {

// Runs a test once for each backend of this binary: operations have one test source for all backends.
// Operands travel through upload and download, so nothing here dereferences device memory.
class BackendTest : public ::testing::TestWithParam<std::string> {
protected:
    BackendTest() : backend_(make_backend(GetParam(), 0)), seed_(seed()), random_(seed_) {
        RecordProperty("seed", static_cast<int>(seed_));
    }

    Backend& backend() { return *backend_; }
    std::mt19937& random() { return random_; }
    std::string trace() const { return "QUANTMILL_TEST_SEED=" + std::to_string(seed_); }

    // Relative precision of results in the activation dtype.
    double precision() const { return backend_->activation_dtype() == DType::f32 ? 2e-6 : 1e-2; }

    std::int64_t integer(std::int64_t low, std::int64_t high) {
        return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
    }

    // Normally distributed values that the activation dtype holds exactly.
    std::vector<float> normal(std::int64_t count, double deviation = 1.0) {
        std::normal_distribution<double> distribution(0.0, deviation);
        std::vector<float> values(static_cast<std::size_t>(count));
        for (float& value : values) value = activation(static_cast<float>(distribution(random_)));
        return values;
    }

    std::vector<std::int32_t> permutation(std::int64_t count) {
        std::vector<std::int32_t> order(static_cast<std::size_t>(count));
        for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
        std::shuffle(order.begin(), order.end(), random_);
        return order;
    }

    template <class T>
    Tensor upload(const std::vector<T>& values, Shape shape) {
        Tensor tensor = backend().empty(shape, dtype_of<T>, "a test's operand");
        EXPECT_EQ(static_cast<std::int64_t>(values.size()), shape.count());
        backend().copy_from_host(values.data(), tensor);
        return tensor;
    }

    template <class T>
    std::vector<T> download(const Tensor& tensor) {
        EXPECT_EQ(tensor.view().dtype(), dtype_of<T>);
        std::vector<T> values(static_cast<std::size_t>(tensor.shape().count()));
        backend().copy_to_host(tensor, values.data());
        return values;
    }

    Tensor upload_activation(const std::vector<float>& values, Shape shape) {
        Tensor exact = upload(values, shape);
        Tensor tensor = activation_tensor(shape);
        backend().convert(exact, tensor);
        return tensor;
    }

    Tensor activation_tensor(Shape shape) {
        return backend().empty(shape, backend().activation_dtype(), "a test's activation");
    }

    std::vector<float> download_activation(const Tensor& tensor) {
        Tensor exact = backend().empty(tensor.shape(), DType::f32, "a test's result");
        backend().convert(tensor, exact);
        return download<float>(exact);
    }

    // What run() returns must be the same bytes with any number of OpenMP threads.
    template <class Run>
    void expect_same_with_any_threads(Run run) {
        if (backend_->description().find("SINGLE_THREADED") != std::string::npos) {
            GTEST_SKIP() << "a serial OpenBLAS cannot be called from two threads";
        }
        const int threads = omp_get_max_threads();
        omp_set_num_threads(1);
        const auto expected = run();
        for (const int count : {2, 3, 5}) {
            omp_set_num_threads(count);
            EXPECT_EQ(run(), expected) << count << " threads";
        }
        omp_set_num_threads(threads);
    }

private:
    static unsigned seed() {
        const char* text = std::getenv("QUANTMILL_TEST_SEED");
        return text != nullptr ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 20240817U;
    }

    float activation(float value) const {
        return backend_->activation_dtype() == DType::bf16 ? to_float(to_bfloat16(value)) : value;
    }

    std::unique_ptr<Backend> backend_;
    unsigned seed_;
    std::mt19937 random_;
};

// Names a suite's tests after their backend: Backends/Linear.EqualsTheSums/cpu.
inline std::string backend_name(const ::testing::TestParamInfo<std::string>& backend) {
    return backend.param;
}

}  // namespace quantmill::testing
