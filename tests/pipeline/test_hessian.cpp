#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "kernels/make_backend.h"
#include "pipeline/hessian.h"

namespace quantmill {
namespace {

using Matrix = std::vector<float>;  // [T, C]

class Hessian : public ::testing::Test {
protected:
    Hessian() : backend_(make_backend("cpu", 0)), seed_(std::random_device{}()), random_(seed_) {}

    Matrix normal(std::int64_t count, double deviation = 1.0) {
        std::normal_distribution<float> distribution(0.0F, static_cast<float>(deviation));
        Matrix values(static_cast<std::size_t>(count));
        for (float& value : values) value = distribution(random_);
        return values;
    }

    Tensor upload(const Matrix& x, std::int64_t columns) {
        Tensor tensor =
            backend_->empty({static_cast<std::int64_t>(x.size()) / columns, columns}, DType::f32, "x");
        backend_->copy_from_host(x.data(), tensor);
        return tensor;
    }

    std::vector<std::int64_t> download(TensorView sum) {
        std::vector<std::int64_t> values(static_cast<std::size_t>(sum.shape().count()));
        backend_->copy_to_host(sum, values.data());
        return values;
    }

    // The fixed-point sum over the shards with the given indices, in that order.
    std::vector<std::int64_t> sum_of(const std::vector<Matrix>& shards,
                                     const std::vector<std::size_t>& indices, std::int64_t columns,
                                     const FixedPointExponents& exponents) {
        HessianAccumulator accumulator(*backend_, columns, static_cast<std::int64_t>(shards.size()));
        for (const std::size_t index : indices) {
            EXPECT_TRUE(accumulator.add(upload(shards[index], columns)));
            EXPECT_TRUE(accumulator.close_shard(exponents));
        }
        return download(accumulator.sum());
    }

    std::unique_ptr<Backend> backend_;
    unsigned seed_;
    std::mt19937 random_;
};

TEST_F(Hessian, ExponentsPutDiagonalsNearTheResolution) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    for (int round = 0; round < 4; ++round) {
        std::vector<float> diagonal;
        for (int i = 0; i < 500; ++i)
            diagonal.push_back(std::exp2(static_cast<float>(random_() % 4000) / 100.0F - 20.0F));
        const float largest = *std::ranges::max_element(diagonal);
        const FixedPointExponents exponents = choose_exponents(diagonal);
        for (std::size_t i = 0; i < diagonal.size(); ++i) {
            // Quiet columns are treated as 2^-20 of the loudest: they may be louder in other shards.
            const double magnitude = std::max(diagonal[i], 0x1p-20F * largest);
            const double fixed = std::ldexp(magnitude, 2 * exponents[i]);
            EXPECT_GE(fixed, 0x1p34);
            EXPECT_LT(fixed, 0x1p38);
        }
    }
    EXPECT_EQ(choose_exponents(std::vector<float>{0.0F, 0.0F}), (FixedPointExponents{18, 18}));
}

TEST_F(Hessian, IntegersAreSummedExactly) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::int64_t columns = 37;
    std::vector<Matrix> shards;
    std::vector<std::int64_t> expected(columns * (columns + 1) / 2);
    for (int s = 0; s < 5; ++s) {
        Matrix x(static_cast<std::size_t>(20 + s) * columns);
        for (float& value : x) value = static_cast<float>(random_() % 15) - 7.0F;
        for (std::size_t t = 0; t < x.size(); t += columns) {
            for (std::size_t i = 0, at = 0; i < columns; ++i) {
                for (std::size_t j = 0; j <= i; ++j, ++at) expected[at] += std::llround(x[t + i] * x[t + j]);
            }
        }
        shards.push_back(std::move(x));
    }
    EXPECT_EQ(sum_of(shards, {0, 1, 2, 3, 4}, columns, FixedPointExponents(columns, 0)), expected);
}

// The promise on which the same bytes on any number of ranks rest.
TEST_F(Hessian, SumDoesNotDependOnWhoAddsWhichShardAndWhen) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::int64_t columns = 70;
    std::vector<Matrix> shards;
    for (int s = 0; s < 6; ++s) shards.push_back(normal((30 + 7 * s) * columns, std::exp(normal(1)[0])));
    HessianAccumulator first(*backend_, columns, 6);
    ASSERT_TRUE(first.add(upload(shards[0], columns)));
    const FixedPointExponents exponents = choose_exponents(first.open_diagonal());

    const auto all = sum_of(shards, {0, 1, 2, 3, 4, 5}, columns, exponents);
    EXPECT_EQ(sum_of(shards, {5, 3, 1, 0, 2, 4}, columns, exponents), all);
    auto parts = sum_of(shards, {4, 0}, columns, exponents);
    const auto others = sum_of(shards, {5, 1, 2, 3}, columns, exponents);
    for (std::size_t i = 0; i < parts.size(); ++i) parts[i] += others[i];
    EXPECT_EQ(parts, all);
}

TEST_F(Hessian, IsCloseToDoublePrecision) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::int64_t columns = 50, tokens = 300;
    const Matrix x = normal(tokens * columns);
    HessianAccumulator accumulator(*backend_, columns, 2);
    // Two micro-batches of one shard,
    ASSERT_TRUE(accumulator.add(upload({x.begin(), x.begin() + 100 * columns}, columns)));
    ASSERT_TRUE(accumulator.add(upload({x.begin() + 100 * columns, x.begin() + 200 * columns}, columns)));
    const FixedPointExponents exponents = choose_exponents(accumulator.open_diagonal());
    ASSERT_TRUE(accumulator.close_shard(exponents));
    // and a second shard.
    ASSERT_TRUE(accumulator.add(upload({x.begin() + 200 * columns, x.end()}, columns)));
    ASSERT_TRUE(accumulator.close_shard(exponents));

    backend_->from_fixed_point(accumulator.sum(), exponents, 2.0 / tokens, accumulator.workspace());
    std::vector<float> h(static_cast<std::size_t>(columns * columns));
    backend_->copy_to_host(accumulator.workspace(), h.data());
    for (std::size_t i = 0; i < columns; ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
            double expected = 0.0;
            for (std::size_t t = 0; t < tokens; ++t)
                expected += double{x[t * columns + i]} * x[t * columns + j];
            EXPECT_NEAR(h[i * columns + j], expected * 2.0 / tokens, 2e-6);
        }
    }
}

// Shards of very different loudness: spread over ranks in any way, each goes to its level, and the merged sum
// is the same to the bit, and right.
TEST_F(Hessian, LoudShardsGoToLevelsThatDoNotDependOnWhoAddsThem) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::int64_t columns = 8, tokens = 40;
    std::vector<Matrix> shards;
    for (const double deviation : {1.0, 0x1p20, 1.0, 0x1p13, 0x1p20}) {
        shards.push_back(normal(tokens * columns, deviation));
    }
    FixedPointExponents exponents;
    const auto rank_of = [&](const std::vector<std::size_t>& own) {
        auto rank = std::make_unique<HessianAccumulator>(*backend_, columns, 5);
        for (const std::size_t s : own) {
            EXPECT_TRUE(rank->add(upload(shards[s], columns)));
            if (exponents.empty()) exponents = choose_exponents(rank->open_diagonal());
            EXPECT_TRUE(rank->close_shard(exponents));
        }
        return rank;
    };
    const auto alone = rank_of({0, 1, 2, 3, 4});
    EXPECT_EQ(alone->levels(), 0b111U);
    const auto one = rank_of({0, 2}), other = rank_of({4, 3, 1});
    EXPECT_EQ(one->levels(), 0b001U);
    one->require_levels(0b111U);
    std::vector<std::vector<std::int64_t>> parts;
    other->for_each_sum([&](TensorView sum) { parts.push_back(download(sum)); });
    std::size_t level = 0;
    one->for_each_sum([&](TensorView sum) {
        auto total = download(sum);
        for (std::size_t i = 0; i < total.size(); ++i) total[i] += parts.at(level)[i];
        backend_->copy_from_host(total.data(), sum);
        ++level;
    });
    EXPECT_THROW(alone->sum(), InternalError);
    FixedPointExponents merged = exponents, merged_parts = exponents;
    alone->merge_levels(merged);
    one->merge_levels(merged_parts);
    EXPECT_EQ(merged, merged_parts);
    EXPECT_EQ(download(alone->sum()), download(one->sum()));

    backend_->from_fixed_point(alone->sum(), merged, 1.0, alone->workspace());
    std::vector<float> h(columns * columns);
    backend_->copy_to_host(alone->workspace(), h.data());
    for (std::size_t i = 0; i < columns; ++i) {
        double expected = 0.0;
        for (const Matrix& x : shards) {
            for (std::size_t t = 0; t < tokens; ++t)
                expected += double{x[t * columns + i]} * x[t * columns + i];
        }
        EXPECT_NEAR(h[i * columns + i] / expected, 1.0, 1e-6);
    }
}

// A shard of the original path's input and of the quantized path's.
struct CrossShard {
    Matrix original, x;
};

TEST_F(Hessian, CrossProductsDoNotDependOnWhoAddsThem) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    const std::int64_t columns = 20, tokens = 40;
    std::vector<CrossShard> shards;
    for (const double deviation : {1.0, 0x1p20, 1.0, 0x1p13, 0x1p20}) {
        CrossShard shard{normal(tokens * columns, deviation / 16), normal(tokens * columns, deviation)};
        for (std::size_t i = 0; i < shard.x.size(); ++i) shard.original[i] += shard.x[i];
        shards.push_back(shard);
    }
    HessianAccumulator first(*backend_, columns, 5);
    ASSERT_TRUE(first.add(upload(shards[0].x, columns)));
    const FixedPointExponents exponents = choose_exponents(first.open_diagonal());
    const auto rank_of = [&](const std::vector<std::size_t>& own) {
        auto rank = std::make_unique<CrossAccumulator>(*backend_, columns, 5);
        for (const std::size_t s : own) {
            rank->add(upload(shards[s].original, columns), upload(shards[s].x, columns));
            EXPECT_TRUE(rank->close_shard(exponents));
        }
        return rank;
    };
    const auto result_of = [&](CrossAccumulator& rank) {
        rank.finish(exponents, 0.25);
        std::vector<float> d(static_cast<std::size_t>(columns * columns));
        backend_->copy_to_host(rank.workspace(), d.data());
        return d;
    };
    const auto alone = rank_of({0, 1, 2, 3, 4});
    EXPECT_GT(alone->levels(), 1U) << "some shard must be loud";
    const auto one = rank_of({0, 2}), other = rank_of({4, 3, 1});
    for (const auto* rank : {one.get(), other.get()}) EXPECT_EQ(rank->levels() & ~alone->levels(), 0U);
    one->require_levels(alone->levels());
    other->require_levels(alone->levels());
    std::vector<std::vector<std::int64_t>> parts;
    other->for_each_sum([&](TensorView sum) { parts.push_back(download(sum)); });
    std::size_t level = 0;
    one->for_each_sum([&](TensorView sum) {
        auto total = download(sum);
        for (std::size_t i = 0; i < total.size(); ++i) total[i] += parts.at(level)[i];
        backend_->copy_from_host(total.data(), sum);
        ++level;
    });
    const auto d = result_of(*alone);
    EXPECT_EQ(result_of(*one), d);
    for (std::size_t i = 0; i < columns; ++i) {
        for (std::size_t j = 0; j < columns; ++j) {
            double expected = 0.0, magnitude = 0.0;
            for (const CrossShard& shard : shards) {
                for (std::size_t t = 0; t < tokens; ++t) {
                    const std::size_t row = t * columns;
                    const double term =
                        (double{shard.original[row + i]} - shard.x[row + i]) * shard.x[row + j];
                    expected += 0.25 * term;
                    magnitude += 0.25 * std::abs(term);
                }
            }
            EXPECT_NEAR(d[i * columns + j], expected, 2e-6 * magnitude);
        }
    }
}

TEST_F(Hessian, CrossProductsThatAreNotFiniteNeverFit) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30F}) {
        CrossAccumulator accumulator(*backend_, 4, 1);
        accumulator.add(upload({1, bad, 3, 4}, 4), upload({1, 2, 3, 4}, 4));
        EXPECT_FALSE(accumulator.close_shard(FixedPointExponents(4, 0))) << bad;
    }
}

TEST_F(Hessian, ValuesThatAreNotFiniteAreRefused) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e35F}) {
        HessianAccumulator accumulator(*backend_, 4, 1);
        EXPECT_TRUE(accumulator.add(upload({1, 2, 3, 4}, 4)));
        EXPECT_FALSE(accumulator.add(upload({1, 2, bad, 4}, 4))) << bad;
        EXPECT_FALSE(accumulator.close_shard(FixedPointExponents(4, 0))) << bad;
    }
}

TEST_F(Hessian, TheSequenceThatIsNotFiniteIsFound) {
    const Sequences sequences{{0, 3, 4, 4, 9}};  // the third has no token
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(), 1e35F}) {
        for (std::size_t token = 0; token < 9; ++token) {
            HessianAccumulator accumulator(*backend_, 4, 1);
            Matrix x = normal(9 * 4);
            x[4 * token + token % 4] = bad;
            x[4 * 8] = bad;  // also in the last, which does not count unless it is the first
            EXPECT_FALSE(accumulator.add(upload(x, 4)));
            EXPECT_EQ(accumulator.first_refused(upload(x, 4), sequences), token < 3 ? 0 : token < 4 ? 1 : 3);
        }
    }
    // Alone each is finite, together they are not.
    HessianAccumulator accumulator(*backend_, 4, 1);
    const Tensor loud = upload(Matrix(std::size_t{4} * 9, 7e18F), 4);
    EXPECT_FALSE(accumulator.add(loud));
    EXPECT_EQ(accumulator.first_refused(loud, sequences), sequences.count());
}

}  // namespace
}  // namespace quantmill
