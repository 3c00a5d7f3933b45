#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/kernels/backend_test.h"

namespace quantmill::testing {
namespace {

class Linear : public BackendTest {
protected:
    std::vector<float> run(const std::vector<float>& x, const std::vector<float>& weight,
                           const std::vector<float>& bias, std::int64_t tokens, std::int64_t columns,
                           std::int64_t outputs) {
        Tensor bias_tensor;
        if (!bias.empty()) bias_tensor = upload(bias, {outputs});
        Tensor out = activation_tensor({tokens, outputs});
        backend().linear(upload_activation(x, {tokens, columns}),
                         upload_activation(weight, {outputs, columns}), bias_tensor, out);
        return download_activation(out);
    }

    void check(std::int64_t tokens, std::int64_t columns, std::int64_t outputs, bool with_bias) {
        SCOPED_TRACE(::testing::Message() << "T=" << tokens << " C=" << columns << " R=" << outputs);
        const auto x = normal(tokens * columns);
        const auto weight = normal(outputs * columns);
        const auto bias = with_bias ? normal(outputs) : std::vector<float>{};
        const auto out = run(x, weight, bias, tokens, columns, outputs);
        for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t r = 0; r < outputs; ++r) {
                double sum = with_bias ? double{bias[r]} : 0.0;
                double magnitude = std::abs(sum) + 1e-30;
                for (std::int64_t c = 0; c < columns; ++c) {
                    const double term = double{x[t * columns + c]} * double{weight[r * columns + c]};
                    sum += term;
                    magnitude += std::abs(term);
                }
                ASSERT_NEAR(out[t * outputs + r], sum, precision() * magnitude) << t << ", " << r;
            }
        }
    }
};

TEST_P(Linear, EqualsTheSums) {
    SCOPED_TRACE(trace());
    check(1, 1, 1, false);
    check(1, 576, 192, true);
    check(600, 64, 3, false);
    check(513, 40, 385, true);  // one more than a tile both ways
    check(1100, 17, 900, false);
    for (int i = 0; i < 10; ++i) check(integer(1, 200), integer(1, 300), integer(1, 200), i % 2 == 0);
}

TEST_P(Linear, NoTokensAreAllowed) { EXPECT_TRUE(run({}, normal(12), {}, 0, 4, 3).empty()); }

TEST_P(Linear, ThreadsDoNotChangeABit) {
    SCOPED_TRACE(trace());
    const auto x = normal(std::int64_t{777} * 300);
    const auto weight = normal(std::int64_t{501} * 300);
    const auto bias = normal(501);
    expect_same_with_any_threads([&] { return run(x, weight, bias, 777, 300, 501); });
}

TEST_P(Linear, RefusesShapesThatDoNotFit) {
    Tensor x = upload_activation(normal(12), {3, 4});
    Tensor weight = upload_activation(normal(10), {2, 5});
    Tensor out = activation_tensor({3, 2});
    EXPECT_THROW(backend().linear(x, weight, {}, out), InternalError);
}

INSTANTIATE_TEST_SUITE_P(Backends, Linear, ::testing::ValuesIn(built_backends()), backend_name);

}  // namespace
}  // namespace quantmill::testing
