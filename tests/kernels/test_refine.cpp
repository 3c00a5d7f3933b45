#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "backend_test.h"
#include "kernels/grid.h"

namespace quantmill::testing {
namespace {

struct Shape2 {
    std::int64_t rows, columns, group_size;
    int bits;
    bool sym;
};

std::ostream& operator<<(std::ostream& out, const Shape2& s) {
    return out << s.rows << " x " << s.columns << ", groups of " << s.group_size << ", " << s.bits
               << " bits, " << (s.sym ? "sym" : "asym");
}

const Shape2 shapes[] = {{1, 1, 1, 4, true},       {3, 7, 3, 2, true},     {70, 130, 32, 4, true},
                         {65, 200, 16, 3, false},  {5, 300, 300, 8, true}, {130, 96, 32, 3, true},
                         {64, 128, 128, 4, false}, {9, 640, 16, 4, true}};

// A quantized linear and the quadratic form that it is judged by, on the host.
struct Problem {
    Shape2 shape;
    QuantizationGrid grid;
    std::vector<float> weights, hessian;
    std::vector<std::uint8_t> codes, zeros;
    std::vector<Half> scales;

    std::int64_t groups() const { return grid.groups(shape.columns); }
    double scale(std::int64_t r, std::int64_t c) const {
        return double{to_float(scales[r * groups() + c / grid.group_size])};
    }
    double step(std::int64_t r, std::int64_t c) const {
        return double{static_cast<float>(codes[r * shape.columns + c])} -
               double{static_cast<float>(zeros[r * groups() + c / grid.group_size])};
    }
    double error(std::int64_t r, std::int64_t c) const {
        return double{weights[r * shape.columns + c]} - scale(r, c) * step(r, c);
    }
    double loss(std::int64_t r) const {
        double sum = 0.0;
        for (std::int64_t i = 0; i < shape.columns; ++i) {
            double product = 0.0;
            for (std::int64_t j = 0; j < shape.columns; ++j) {
                product += double{hessian[i * shape.columns + j]} * error(r, j);
            }
            sum += error(r, i) * product;
        }
        return sum;
    }
};

class Refine : public BackendTest {
protected:
    // Rounded to nearest with min-max scales; H = XᵀX / T + λI of correlated inputs.
    Problem problem(const Shape2& shape) {
        Problem p;
        p.shape = shape;
        p.grid = {.bits = shape.bits, .group_size = shape.group_size, .sym = shape.sym};
        std::normal_distribution<float> normal;
        p.weights.resize(static_cast<std::size_t>(shape.rows * shape.columns));
        for (float& w : p.weights) w = normal(random());
        const std::int64_t tokens = 2 * shape.columns;
        std::vector<float> x(static_cast<std::size_t>(tokens * shape.columns));
        for (std::int64_t t = 0; t < tokens; ++t) {
            float shared = normal(random());
            for (std::int64_t c = 0; c < shape.columns; ++c) {
                shared = 0.9F * shared + 0.4F * normal(random());
                x[t * shape.columns + c] = shared;
            }
        }
        p.hessian.resize(static_cast<std::size_t>(shape.columns * shape.columns));
        for (std::int64_t i = 0; i < shape.columns; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) {
                double sum = i == j ? 0.05 * static_cast<double>(tokens) : 0.0;
                for (std::int64_t t = 0; t < tokens; ++t) {
                    sum += double{x[t * shape.columns + i]} * double{x[t * shape.columns + j]};
                }
                p.hessian[i * shape.columns + j] = p.hessian[j * shape.columns + i] =
                    static_cast<float>(sum / static_cast<double>(tokens));
            }
        }
        round_to_nearest(p);
        return p;
    }

    static void round_to_nearest(Problem& p) {
        for (std::int64_t r = 0; r < p.shape.rows; ++r) {
            for (std::int64_t g = 0; g < p.groups(); ++g) {
                float low = 0.0F;
                float high = 0.0F;
                const std::int64_t end = std::min((g + 1) * p.grid.group_size, p.shape.columns);
                for (std::int64_t c = g * p.grid.group_size; c < end; ++c) {
                    low = std::min(low, p.weights[r * p.shape.columns + c]);
                    high = std::max(high, p.weights[r * p.shape.columns + c]);
                }
                const GroupParameters parameters = group_parameters(low, high, p.grid);
                p.scales.push_back(parameters.scale);
                p.zeros.push_back(static_cast<std::uint8_t>(parameters.zero));
            }
            for (std::int64_t c = 0; c < p.shape.columns; ++c) {
                const auto zero = static_cast<float>(p.zeros[r * p.groups() + c / p.grid.group_size]);
                p.codes.push_back(static_cast<std::uint8_t>(quantize(p.weights[r * p.shape.columns + c],
                                                                     static_cast<float>(p.scale(r, c)), zero,
                                                                     static_cast<float>(p.grid.max_code()))));
            }
        }
    }

    // Runs an operation on rows [begin, end) of the problem and takes codes and scales back.
    template <class Operation>
    void run_rows(Problem& p, std::int64_t begin, std::int64_t end, const Operation& operation) {
        const Shape2& s = p.shape;
        Tensor weights = upload(p.weights, {s.rows, s.columns});
        Tensor hessian = upload(p.hessian, {s.columns, s.columns});
        Tensor codes = upload(p.codes, {s.rows, s.columns});
        Tensor scales = upload(p.scales, {s.rows, p.groups()});
        Tensor zeros = upload(p.zeros, {s.rows, p.groups()});
        operation(weights.view().rows(begin, end), hessian.view(),
                  QuantizedViews{codes.view().rows(begin, end), scales.view().rows(begin, end),
                                 zeros.view().rows(begin, end)});
        p.codes = download<std::uint8_t>(codes);
        p.scales = download<Half>(scales);
    }
    void sweep(Problem& p) {
        run_rows(p, 0, p.shape.rows, [&](ConstTensorView w, ConstTensorView h, QuantizedViews q) {
            backend().sweep_codes(w, h, p.grid, q);
        });
    }
    void refit(Problem& p) {
        run_rows(p, 0, p.shape.rows, [&](ConstTensorView w, ConstTensorView h, QuantizedViews q) {
            backend().refit_scales(w, h, p.grid, q);
        });
    }
    std::vector<float> losses(Problem& p) {
        std::vector<float> result;
        run_rows(p, 0, p.shape.rows, [&](ConstTensorView w, ConstTensorView h, QuantizedViews q) {
            Tensor loss = backend().empty({p.shape.rows}, DType::f32, "losses");
            backend().quadratic_loss(w, h, p.grid, q, loss);
            result = download<float>(loss);
        });
        return result;
    }
};

TEST_P(Refine, MirrorsTheTriangle) {
    for (const std::int64_t n : {1, 5, 64, 67, 200}) {
        std::vector<float> h = normal(n * n);
        Tensor tensor = upload(h, {n, n});
        backend().mirror_triangle(tensor);
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t j = 0; j < i; ++j) h[j * n + i] = h[i * n + j];
        }
        EXPECT_EQ(download<float>(tensor), h) << n;
    }
}

TEST_P(Refine, LossesAreTheQuadraticForm) {
    SCOPED_TRACE(trace());
    for (const Shape2& shape : shapes) {
        Problem p = problem(shape);
        const std::vector<float> found = losses(p);
        for (std::int64_t r = 0; r < shape.rows; ++r) {
            EXPECT_NEAR(found[r], p.loss(r), 2e-4 * p.loss(r) + 1e-12) << shape << ", row " << r;
        }
    }
}

// Coordinate descent in double, column by column. Codes may part after a target that lies within 1e-3 of a
// step from a rounding boundary; rows without such a place agree in all codes.
TEST_P(Refine, ASweepIsCoordinateDescent) {
    SCOPED_TRACE(trace());
    for (const Shape2& shape : shapes) {
        Problem p = problem(shape);
        const Problem before = p;
        sweep(p);
        std::int64_t compared = 0;
        for (std::int64_t r = 0; r < shape.rows; ++r) {
            Problem expected = before;
            for (std::int64_t j = 0; j < shape.columns; ++j) {
                double others = 0.0;
                for (std::int64_t i = 0; i < shape.columns; ++i) {
                    if (i != j) others += expected.error(r, i) * double{p.hessian[j * shape.columns + i]};
                }
                const double zero = expected.zeros[r * p.groups() + j / p.grid.group_size];
                const double target = (double{p.weights[r * shape.columns + j]} +
                                       others / double{p.hessian[j * shape.columns + j]}) /
                                          expected.scale(r, j) +
                                      zero;
                const double nearest = std::clamp(std::nearbyint(target), 0.0, double(p.grid.max_code()));
                if (std::abs(target - std::floor(target) - 0.5) < 1e-3) break;
                ASSERT_EQ(p.codes[r * shape.columns + j], nearest) << shape << ", row " << r << ", " << j;
                expected.codes[r * shape.columns + j] = static_cast<std::uint8_t>(nearest);
                ++compared;
            }
            EXPECT_LE(p.loss(r), before.loss(r) * (1.0 + 1e-5) + 1e-12) << shape << ", row " << r;
        }
        EXPECT_GT(compared, shape.rows * shape.columns / 3) << shape;
    }
}

// With at most kRefitWindow groups the fit is the least-squares solution, but for the rounding of scales.
TEST_P(Refine, ARefitIsLeastSquares) {
    SCOPED_TRACE(trace());
    for (const Shape2& shape : shapes) {
        Problem p = problem(shape);
        const Problem before = p;
        refit(p);
        double sum_before = 0.0;
        double sum_after = 0.0;
        for (std::int64_t r = 0; r < shape.rows; ++r) {
            EXPECT_LE(p.loss(r), before.loss(r) * (1.0 + 1e-5) + 1e-12) << shape << ", row " << r;
            sum_before += before.loss(r);
            sum_after += p.loss(r);
            if (p.groups() > kRefitWindow) continue;
            // No scale can move by two of its units in the last place and lower the loss.
            for (std::int64_t g = 0; g < p.groups(); ++g) {
                Problem moved = p;
                Half& scale = moved.scales[r * p.groups() + g];
                for (const float factor : {1.0F - 0x1p-9F, 1.0F + 0x1p-9F}) {
                    scale = to_half(to_float(p.scales[r * p.groups() + g]) * factor);
                    EXPECT_GE(moved.loss(r), p.loss(r) * (1.0 - 2e-4)) << shape << ", row " << r << ", " << g;
                }
            }
        }
        EXPECT_LE(sum_after, sum_before) << shape;
        if (shape.columns > 64 && shape.bits < 8) {
            EXPECT_LT(sum_after, 0.995 * sum_before) << shape;
        }
    }
}

TEST_P(Refine, ScalesThatBf16HoldsStayThose) {
    SCOPED_TRACE(trace());
    Problem p = problem({40, 96, 32, 3, true});
    p.grid.bf16_scales = true;
    const auto scales = p.scales;
    for (Half& scale : p.scales) scale = to_half(to_float(to_bfloat16(to_float(scale))));
    refit(p);
    EXPECT_NE(p.scales, scales);
    for (const Half scale : p.scales) EXPECT_EQ(to_float(to_bfloat16(to_float(scale))), to_float(scale));
}

TEST_P(Refine, NegativeScalesKeepTheirSign) {
    SCOPED_TRACE(trace());
    Problem p = problem({40, 96, 32, 3, true});
    // The mirrored grid: scale −s and codes 2·zero − code, where those exist.
    for (std::size_t i = 0; i < p.codes.size(); ++i)
        p.codes[i] = static_cast<std::uint8_t>(std::min(8 - p.codes[i], 7));
    for (Half& scale : p.scales) scale = to_half(-to_float(scale));
    const Problem before = p;
    refit(p);
    sweep(p);
    for (std::int64_t r = 0; r < p.shape.rows; ++r) EXPECT_LE(p.loss(r), before.loss(r) * 1.00001);
    for (const Half scale : p.scales) EXPECT_LT(to_float(scale), 0.0F);
}

TEST_P(Refine, RowsDoNotDependOnTheirCompany) {
    SCOPED_TRACE(trace());
    Problem whole = problem({150, 160, 32, 4, true});
    Problem split = whole;
    const auto operation = [&](ConstTensorView w, ConstTensorView h, QuantizedViews q) {
        backend().sweep_codes(w, h, whole.grid, q);
        backend().refit_scales(w, h, whole.grid, q);
    };
    run_rows(whole, 0, 150, operation);
    run_rows(split, 0, 64, operation);
    run_rows(split, 64, 150, operation);
    EXPECT_EQ(whole.codes, split.codes);
    EXPECT_TRUE(std::equal(whole.scales.begin(), whole.scales.end(), split.scales.begin(),
                           [](Half a, Half b) { return to_float(a) == to_float(b); }));
}

INSTANTIATE_TEST_SUITE_P(Backends, Refine, ::testing::ValuesIn(built_backends()), backend_name);

}  // namespace
}  // namespace quantmill::testing
