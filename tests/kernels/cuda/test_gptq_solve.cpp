#include "tests/kernels/cuda/fixture.h"

namespace quantmill::testing {
namespace {

struct Solution {
    std::vector<std::uint8_t> codes, zeros;
    std::vector<float> scales, loss;
    bool operator==(const Solution&) const = default;
};

class Solve : public CudaTest {
protected:
    struct Problem {
        std::int64_t rows, columns;
        std::vector<float> weights, cpu_factor, cuda_factor;  // factors: upper triangles, the rest is NaN
    };

    // Weights that vary by row, and the factors that both backends find for the same damped fp32 Hessian of
    // correlated columns.
    Problem make(std::int64_t rows, std::int64_t columns) {
        const std::int64_t tokens = columns + columns / 2 + 5;
        std::vector<float> x = normal(tokens * columns);
        for (std::int64_t i = 0; i < tokens * columns; ++i) {
            if (i % columns > 0) x[i] += 0.6F * x[i - 1];
            x[i] *= 0.3F + static_cast<float>(i % columns % 5);
        }
        Tensor h = cpu().empty({columns, columns}, DType::f32, "test");
        cpu().zero(h);
        cpu().accumulate_hessian(put(cpu(), x, {tokens, columns}), h);
        std::vector<float> diagonal = cpu().read_diagonal(h);
        double mean = 0.0;
        for (const float value : diagonal) mean += value / static_cast<double>(columns);
        for (float& value : diagonal) value += static_cast<float>(0.05 * mean);
        cpu().write_diagonal(diagonal, h);
        Tensor device = put(cuda(), get<float>(h), {columns, columns});
        EXPECT_TRUE(cpu().reverse_cholesky(h));
        EXPECT_TRUE(cuda().reverse_cholesky(device));
        return {rows, columns, normal(rows * columns, 0.02F), upper(h), upper(device)};
    }
    static std::vector<float> upper(const Tensor& factor) {
        std::vector<float> values = get<float>(factor);
        const std::int64_t n = factor.shape()[0];
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t j = 0; j < i; ++j) values[i * n + j] = std::nanf("");
        }
        return values;
    }

    static Solution solve(Backend& backend, const Problem& p, const QuantizationGrid& grid,
                          std::int64_t begin, std::int64_t end) {
        const Tensor weights = put(backend, p.weights, {p.rows, p.columns});
        const Tensor factor =
            put(backend, &backend == &cuda() ? p.cuda_factor : p.cpu_factor, {p.columns, p.columns});
        const std::int64_t rows = end - begin;
        const std::int64_t groups = grid.groups(p.columns);
        Tensor codes = poisoned(backend, {rows, p.columns}, DType::u8);
        Tensor scales = poisoned(backend, {rows, groups}, DType::f16);
        Tensor zeros = poisoned(backend, {rows, groups}, DType::u8);
        Tensor loss = poisoned(backend, {rows}, DType::f32);
        backend.gptq_solve(ConstTensorView(weights).rows(begin, end), factor, grid, {codes, scales, zeros},
                           loss);
        return {get<std::uint8_t>(codes), get<std::uint8_t>(zeros), get_floats(scales), get<float>(loss)};
    }
    static Solution solve(Backend& backend, const Problem& p, const QuantizationGrid& grid) {
        return solve(backend, p, grid, 0, p.rows);
    }
    // Grids are chosen beforehand, and column j is in group j * 7 % groups.
    static Solution solve_static(Backend& backend, const Problem& p, const QuantizationGrid& grid) {
        const Tensor weights = put(backend, p.weights, {p.rows, p.columns});
        const Tensor factor =
            put(backend, &backend == &cuda() ? p.cuda_factor : p.cpu_factor, {p.columns, p.columns});
        const std::int64_t groups = grid.groups(p.columns);
        std::vector<std::int32_t> given;
        std::vector<float> importance;
        for (std::int64_t j = 0; j < p.columns; ++j) {
            given.push_back(static_cast<std::int32_t>(j * 7 % groups));
            importance.push_back(0.1F + static_cast<float>(j % 11));
        }
        Tensor codes = poisoned(backend, {p.rows, p.columns}, DType::u8);
        Tensor scales = poisoned(backend, {p.rows, groups}, DType::f16);
        Tensor zeros = poisoned(backend, {p.rows, groups}, DType::u8);
        Tensor loss = poisoned(backend, {p.rows}, DType::f32);
        backend.choose_grids(weights, importance, grid, {{}, scales, zeros});
        backend.gptq_solve_static(weights, factor, given, grid, {codes, scales, zeros}, loss);
        return {get<std::uint8_t>(codes), get<std::uint8_t>(zeros), get_floats(scales), get<float>(loss)};
    }

    static ::testing::Message name_of(const Problem& p, const QuantizationGrid& grid) {
        constexpr const char* kSearches[] = {"minmax", "mse", "hessian"};
        return ::testing::Message() << p.rows << " x " << p.columns << ", " << grid.bits
                                    << " bits, groups of " << grid.group_size
                                    << (grid.sym ? ", symmetric" : ", asymmetric") << ", "
                                    << kSearches[static_cast<int>(grid.search)]
                                    << (grid.signed_scales ? ", signed" : "")
                                    << (grid.bf16_scales ? ", bf16" : "");
    }

    static void expect_agreement(const Problem& p, const QuantizationGrid& grid) {
        SCOPED_TRACE(name_of(p, grid));
        compare(p, grid, solve(cpu(), p, grid), solve(cuda(), p, grid));
    }

    // A search has candidates that are as good as equal, so a rounding decides between them more often than
    // between two codes, and a group that takes another scale changes its row from there on.
    static void compare(const Problem& p, const QuantizationGrid& grid, const Solution& expected,
                        const Solution& actual) {
        const bool searched = grid.search != ScaleSearch::minmax;
        std::size_t different = 0;
        for (std::size_t i = 0; i < expected.codes.size(); ++i) {
            if (actual.codes[i] != expected.codes[i]) ++different;
            ASSERT_LE(actual.codes[i], grid.max_code());
        }
        // Wider ones, whose products are not fp32's, are chaotic: only their loss is comparable.
        const double share = static_cast<double>(different) / static_cast<double>(expected.codes.size());
        if (p.columns <= 2048) {
            EXPECT_LE(share, searched ? 0.02 : 0.001);
        }
        double expected_loss = 0.0;
        double loss = 0.0;
        double squares = 0.0;
        for (std::int64_t r = 0; r < p.rows; ++r) {
            expected_loss += expected.loss[r];
            loss += actual.loss[r];
            squares += std::pow(double{actual.loss[r]} - double{expected.loss[r]}, 2);
        }
        // A flipped code sends its row another way, so only the sum over rows is comparable. Rows that a
        // search sent another way differ by chance: no more than four standard deviations of their sum.
        EXPECT_NEAR(loss, expected_loss,
                    std::max(0.001 * expected_loss, searched ? 4.0 * std::sqrt(squares) : 0.0));
        if (p.columns > 2048) return;  // a scale follows from codes
        std::size_t scales = 0;
        for (std::size_t i = 0; i < expected.scales.size(); ++i) {
            if (actual.scales[i] != expected.scales[i]) ++scales;
        }
        // Where a scale lies next to a rounding boundary of fp16, another order of sums may cross it.
        EXPECT_LE(scales, 2 + expected.scales.size() * 3 / 100);
    }
};

TEST_F(Solve, agrees_with_the_cpu) {
    const Problem p = make(512, 512);
    for (const int bits : {2, 3, 4, 8}) {
        for (const std::int64_t group : {16, 32, 64, 128, 256, 512}) {
            for (const bool sym : {true, false}) expect_agreement(p, {bits, group, sym});
        }
    }
}

std::vector<QuantizationGrid> searched_grids(std::int64_t group) {
    std::vector<QuantizationGrid> grids;
    for (const int bits : {2, 3, 4, 8}) {
        for (const ScaleSearch search : {ScaleSearch::minmax, ScaleSearch::mse, ScaleSearch::hessian}) {
            for (const bool bf16 : {false, true}) {
                grids.push_back({bits, group, false, search, false, bf16});
                grids.push_back({bits, group, true, search, false, bf16});
                grids.push_back({bits, group, true, search, true, bf16});
            }
        }
    }
    return grids;
}

TEST_F(Solve, searches_as_the_cpu_does) {
    Problem p = make(320, 512);
    p.cuda_factor = p.cpu_factor;  // the searches are compared, not two factorizations
    for (const std::int64_t group : {16, 48, 64, 128, 200, 256, 512}) {
        for (const QuantizationGrid& grid : searched_grids(group)) expect_agreement(p, grid);
    }
}

// Before anything is solved both see the same weights: all but ties must be equal.
TEST_F(Solve, chooses_the_grids_of_original_weights_as_the_cpu_does) {
    Problem p = make(300, 330);
    p.cuda_factor = p.cpu_factor;
    for (const std::int64_t group : {7, 64, 128, 330}) {
        for (const QuantizationGrid& grid : searched_grids(group)) {
            SCOPED_TRACE(name_of(p, grid));
            const Solution expected = solve_static(cpu(), p, grid);
            const Solution actual = solve_static(cuda(), p, grid);
            std::size_t different = 0;
            for (std::size_t i = 0; i < expected.scales.size(); ++i) {
                different += actual.scales[i] != expected.scales[i] || actual.zeros[i] != expected.zeros[i];
            }
            EXPECT_LE(different, 1 + expected.scales.size() / 500);
            compare(p, grid, expected, actual);
        }
    }
}

TEST_F(Solve, searches_wider_matrices) {
    for (const std::int64_t group : {128, 1024, 2304}) {
        const Problem p = make(200, 2304);
        expect_agreement(p, {3, group, true, ScaleSearch::hessian, true, true});
        expect_agreement(p, {2, group, false, ScaleSearch::mse, false, false});
        const QuantizationGrid grid{4, group, true, ScaleSearch::hessian, true, false};
        compare(p, grid, solve_static(cpu(), p, grid), solve_static(cuda(), p, grid));
    }
}

TEST_F(Solve, agrees_at_unusual_shapes) {
    for (const auto& [rows, columns, group] : {std::tuple{1, 1, 1},
                                               {1, 130, 128},
                                               {70, 100, 7},
                                               {65, 333, 48},
                                               {33, 450, 200},
                                               {20, 1500, 130},
                                               {64, 1300, 64}}) {
        Problem p = make(rows, columns);
        p.cuda_factor = p.cpu_factor;  // so few codes are more than 0.1% where one tie flips
        expect_agreement(p, {4, group, true});
        expect_agreement(p, {4, group, false});
    }
}

TEST_F(Solve, agrees_over_several_panels) {
    Problem p = make(512, 2048);
    p.cuda_factor =
        p.cpu_factor;  // two fp32 factors of this width differ by more than the solves (RESULTS.md)
    for (const std::int64_t group : {32, 128, 1024, 2048}) {
        expect_agreement(p, {4, group, true});
        expect_agreement(p, {3, group, false});
        expect_agreement(p, {8, group, true});
        expect_agreement(p, {8, group, false});
    }
}

// Where products run on tensor cores in two bf16 parts; enough rows for the chance in each to even out.
TEST_F(Solve, agrees_on_the_loss_of_wider_matrices) {
    for (const auto& [rows, columns, group] : {std::tuple{700, 2100, 130},
                                               {666, 2053, 7},
                                               {650, 2333, 48},
                                               {960, 2304, 128},
                                               {640, 2304, 1024},
                                               {640, 2304, 2304}}) {
        const Problem p = make(rows, columns);
        expect_agreement(p, {4, group, true});
        expect_agreement(p, {3, group, false});
    }
}

TEST_F(Solve, a_row_gets_the_same_bytes_in_any_company_and_in_every_run) {
    const std::vector<Problem> problems{make(300, 1280), make(300, 2304)};
    for (const auto& [which, group] : {std::pair{0, 128}, {0, 256}, {0, 1280}, {1, 128}, {1, 256}}) {
        const Problem& p = problems[which];
        const QuantizationGrid grid{4, group, true, ScaleSearch::hessian, true, true};
        const Solution all = solve(cuda(), p, grid);
        EXPECT_EQ(solve(cuda(), p, grid), all);
        for (const auto& [begin, end] : {std::pair{0, 1}, {37, 45}, {100, 291}, {299, 300}}) {
            const Solution some = solve(cuda(), p, grid, begin, end);
            const std::vector<std::uint8_t> codes(all.codes.begin() + begin * p.columns,
                                                  all.codes.begin() + end * p.columns);
            EXPECT_EQ(some.codes, codes) << begin;
            EXPECT_EQ(some.loss, std::vector<float>(all.loss.begin() + begin, all.loss.begin() + end));
        }
    }
}

TEST_F(Solve, zero_weights_stay_zero) {
    Problem p = make(10, 256);
    std::fill(p.weights.begin(), p.weights.end(), 0.0F);
    for (const bool sym : {true, false}) {
        for (const ScaleSearch search : {ScaleSearch::minmax, ScaleSearch::mse, ScaleSearch::hessian}) {
            const Solution solution = solve(cuda(), p, {4, 128, sym, search, sym});
            for (std::size_t i = 0; i < solution.codes.size(); ++i) {
                ASSERT_EQ(solution.codes[i], solution.zeros[i / 128]);
            }
            for (const float loss : solution.loss) ASSERT_EQ(loss, 0.0F);
        }
    }
}

// Each kind of launch once and small: what racecheck sees (tools/gpu_check.sh), which takes seconds a launch.
struct Kind {
    const char* name;
    std::int64_t columns;  // up to 2048 products are fp32's
    QuantizationGrid grid;
    bool is_static;
    friend void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }
};
class OneSolve : public Solve, public ::testing::WithParamInterface<Kind> {};

TEST_P(OneSolve, agrees_with_the_cpu) {
    const Kind& kind = GetParam();
    Problem p = make(70, kind.columns);
    p.cuda_factor = p.cpu_factor;
    if (kind.is_static) {
        compare(p, kind.grid, solve_static(cpu(), p, kind.grid), solve_static(cuda(), p, kind.grid));
    } else {
        expect_agreement(p, kind.grid);
    }
}

constexpr ScaleSearch kHessian = ScaleSearch::hessian;
INSTANTIATE_TEST_SUITE_P(
    Kinds, OneSolve,
    ::testing::Values(Kind{"minmax", 200, {4, 64, true}, false},
                      Kind{"searched", 200, {3, 64, true, kHessian, true, true}, false},
                      Kind{"mse", 200, {4, 48, false, ScaleSearch::mse}, false},
                      Kind{"wide_groups", 300, {4, 200, true, kHessian, true}, false},
                      Kind{"given", 200, {4, 64, true, kHessian, true}, true},
                      Kind{"tensor_cores", 2176, {4, 128, true}, false},
                      Kind{"tensor_cores_searched", 2176, {4, 128, true, kHessian, true}, false},
                      Kind{"tensor_cores_wide_groups", 2176, {4, 1024, false, kHessian}, false}),
    [](const ::testing::TestParamInfo<Kind>& kind) { return std::string(kind.param.name); });

}  // namespace
}  // namespace quantmill::testing
