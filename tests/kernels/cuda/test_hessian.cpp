#include <numeric>

#include "tests/kernels/cuda/fixture.h"

namespace quantmill::testing {
namespace {

using Hessian = CudaTest;

// Lower triangle of the upload's square plus xᵀ·x.
std::vector<float> lower(const std::vector<float>& h, std::int64_t n) {
    std::vector<float> triangle;
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) triangle.push_back(h[i * n + j]);
    }
    return triangle;
}

TEST_F(Hessian, of_integers_is_exact) {
    std::vector<std::pair<std::int64_t, std::int64_t>> shapes{
        {1, 1}, {10, 7}, {100, 64}, {300, 576}, {17000, 72}, {64, 2304}, {20, 3400}, {33, 5000}};
    for (int i = 0; i < 5; ++i) shapes.emplace_back(integer(1, 500), integer(1, 900));
    for (const auto& [tokens, n] : shapes) {
        SCOPED_TRACE(::testing::Message() << tokens << " x " << n);
        std::vector<float> x(tokens * n);
        for (float& value : x) value = static_cast<float>(integer(-8, 8));
        Tensor a = cpu().empty({n, n}, DType::f32, "test");
        Tensor b = cuda().empty({n, n}, DType::f32, "test");
        cpu().zero(a);
        cuda().zero(b);
        for (int pass = 0; pass < 2; ++pass) {
            cpu().accumulate_hessian(put(cpu(), x, {tokens, n}), a);
            cuda().accumulate_hessian(put(cuda(), x, {tokens, n}, DType::bf16), b);
        }
        EXPECT_EQ(lower(get<float>(b), n), lower(get<float>(a), n));
    }
}

TEST_F(Hessian, of_real_numbers) {
    const std::int64_t tokens = 500;
    const std::int64_t n = 200;
    const std::vector<float> x = activations(tokens * n);
    Tensor h = cuda().empty({n, n}, DType::f32, "test");
    cuda().zero(h);
    cuda().accumulate_hessian(put(cuda(), x, {tokens, n}, DType::bf16), h);
    const std::vector<float> actual = get<float>(h);
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) {
            double sum = 0.0;
            double magnitude = 0.0;
            for (std::int64_t t = 0; t < tokens; ++t) {
                const double product = double{x[t * n + i]} * double{x[t * n + j]};
                sum += product;
                magnitude += std::abs(product);
            }
            // Tensor cores cut off, 2 units a step.
            ASSERT_NEAR(actual[i * n + j], sum, 2 * (tokens + 2) * kFp32Unit * magnitude);
        }
    }
}

TEST_F(Hessian, fixed_point_is_the_cpu_s) {
    const std::int64_t n = 301;
    const std::vector<float> h = normal(n * n, 50.0F);
    std::vector<std::int32_t> exponents(n);
    for (auto& exponent : exponents) exponent = static_cast<std::int32_t>(integer(8, 20));
    std::vector<std::vector<std::int64_t>> sums;
    std::vector<std::vector<float>> back;
    for (Backend* backend : std::initializer_list<Backend*>{&cpu(), &cuda()}) {
        const Tensor source = put(*backend, h, {n, n});
        Tensor sum = backend->empty({n * (n + 1) / 2}, DType::i64, "test");
        backend->zero(sum);
        backend->add_fixed_point(source, exponents, sum);
        backend->add_fixed_point(source, exponents, sum);
        sums.push_back(get<std::int64_t>(sum));
        Tensor result = backend->empty({n, n}, DType::f32, "test");
        backend->from_fixed_point(sum, exponents, 0.125, result);
        back.push_back(lower(get<float>(result), n));
    }
    EXPECT_EQ(sums[0], sums[1]);
    EXPECT_EQ(back[0], back[1]);
    EXPECT_NEAR(back[0][0], 0.25 * h[0], 1e-3);
}

TEST_F(Hessian, fixed_point_refuses_what_it_cannot_hold) {
    for (const float value : {std::nanf(""), 1e30F}) {
        const Tensor h = put(cuda(), std::vector<float>{value}, {1, 1});
        const std::vector<std::int32_t> exponents{20};
        Tensor sum = cuda().empty({1}, DType::i64, "test");
        cuda().zero(sum);
        EXPECT_THROW(cuda().add_fixed_point(h, exponents, sum), InternalError);
    }
}

TEST_F(Hessian, diagonal_and_order) {
    const std::int64_t n = 257;
    const std::vector<float> source = normal(n * n);
    Tensor h = put(cuda(), source, {n, n});
    const std::vector<float> diagonal = cuda().read_diagonal(h);
    for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(diagonal[i], source[i * n + i]);
    const std::vector<float> ones(n, 1.0F);
    cuda().write_diagonal(ones, h);
    EXPECT_EQ(cuda().read_diagonal(h), ones);

    std::vector<std::int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    Tensor a = poisoned(cpu(), {n, n}, DType::f32);
    Tensor b = poisoned(cuda(), {n, n}, DType::f32);
    cpu().permute_symmetric(put(cpu(), source, {n, n}), order, a);
    cuda().permute_symmetric(put(cuda(), source, {n, n}), order, b);
    EXPECT_EQ(lower(get<float>(b), n), lower(get<float>(a), n));
}

}  // namespace
}  // namespace quantmill::testing
