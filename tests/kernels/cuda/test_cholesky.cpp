#include "tests/kernels/cuda/fixture.h"

namespace quantmill::testing {
namespace {

class Cholesky : public CudaTest {
protected:
    // (2/T) XᵀX plus damping, computed in fp32 on the CPU backend; the upper triangle is poison.
    std::vector<float> hessian(std::int64_t n, double damping = 0.05) {
        const std::int64_t tokens = 2 * n + 3;
        std::vector<float> x = normal(tokens * n);
        for (std::int64_t i = 0; i < tokens * n; ++i) {
            x[i] *= 0.2F + static_cast<float>(i % n % 7);  // columns of unequal size
            if (i % n > 0) x[i] += 0.5F * x[i - 1];        // and not independent
        }
        Tensor h = cpu().empty({n, n}, DType::f32, "test");
        cpu().zero(h);
        cpu().accumulate_hessian(put(cpu(), x, {tokens, n}), h);
        std::vector<float> values = get<float>(h);
        double mean = 0.0;
        for (std::int64_t i = 0; i < n; ++i) mean += values[i * n + i] / static_cast<double>(n);
        for (std::int64_t i = 0; i < n; ++i) {
            values[i * n + i] += static_cast<float>(damping * mean);
            for (std::int64_t j = i + 1; j < n; ++j) values[i * n + j] = std::nanf("");
        }
        return values;
    }

    void expect_factor(std::int64_t n) {
        SCOPED_TRACE(n);
        const std::vector<float> h = hessian(n);
        Tensor device = put(cuda(), h, {n, n});
        ASSERT_TRUE(cuda().reverse_cholesky(device));
        const std::vector<float> factor = get<float>(device);
        std::vector<double> r(n * n, 0.0);
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t j = i; j < n; ++j) {
                r[i * n + j] = i == j ? double{factor[i * n + i]}
                                      : double{factor[i * n + j]} * double{factor[j * n + j]};
            }
        }
        // |E_ij| <= unit · Σ_k |R_ik R_jk| <= unit · sqrt(H_ii H_jj): fp32 inside blocks of 128, and
        // between them sums of n products in fp32 or, beyond 2048, three products of bf16 parts, which leave
        // out 2⁻¹⁶ of a product and are cut off, 2 units a step, in sums of at most 3072.
        const double between = n > 2048 ? 0x1p-16 + 6144 * kFp32Unit : static_cast<double>(n) * kFp32Unit;
        const double unit =
            (4.0 * static_cast<double>(std::min<std::int64_t>(n, 128)) + 8.0) * kFp32Unit + between;
        std::size_t wrong = 0;
        const std::int64_t stride = n > 600 ? 7 : 1;  // a sample of the rows
        for (std::int64_t i = 0; i < n; i += stride) {
            for (std::int64_t j = 0; j <= i; ++j) {
                double sum = 0.0;
                for (std::int64_t k = i; k < n; ++k) sum += r[i * n + k] * r[j * n + k];
                const double scale = std::sqrt(double{h[i * n + i]} * double{h[j * n + j]});
                if (!(std::abs(sum - h[i * n + j]) <= unit * scale)) ++wrong;
            }
        }
        EXPECT_EQ(wrong, 0U);
    }
};

TEST_F(Cholesky, factor_times_its_transpose_is_the_matrix) {
    for (const std::int64_t n : {1, 2, 31, 127, 128, 129, 300, 1000, 1024, 1025, 1300, 2048, 2049, 2200}) {
        expect_factor(n);
    }
}

// What racecheck sees (tools/gpu_check.sh), which takes seconds a launch.
TEST_F(Cholesky, one_factor_in_fp32) { expect_factor(300); }
TEST_F(Cholesky, one_factor_on_tensor_cores) { expect_factor(2176); }

TEST_F(Cholesky, two_runs_give_the_same_bytes) {
    for (const std::int64_t n : {1300, 2304}) {
        const std::vector<float> h = hessian(n);
        Tensor a = put(cuda(), h, {n, n});
        Tensor b = put(cuda(), h, {n, n});
        ASSERT_TRUE(cuda().reverse_cholesky(a));
        ASSERT_TRUE(cuda().reverse_cholesky(b));
        std::vector<float> first = get<float>(a);
        std::vector<float> second = get<float>(b);
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t j = i; j < n; ++j) ASSERT_EQ(first[i * n + j], second[i * n + j]);
        }
    }
}

TEST_F(Cholesky, says_when_a_matrix_is_not_positive_definite) {
    for (const std::int64_t n : {1, 130, 1100, 2100}) {
        for (const float bad : {0.0F, -1.0F, std::nanf("")}) {
            for (const std::int64_t place : {std::int64_t{0}, n / 2, n - 1}) {
                std::vector<float> h(n * n, 0.0F);
                for (std::int64_t i = 0; i < n; ++i) h[i * n + i] = 1.0F;
                h[place * n + place] = bad;
                Tensor device = put(cuda(), h, {n, n});
                EXPECT_FALSE(cuda().reverse_cholesky(device)) << n << ", " << bad << " at " << place;
            }
        }
    }
}

}  // namespace
}  // namespace quantmill::testing
