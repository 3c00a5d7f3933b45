#include "pipeline/gptq_solver.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "kernels/half.h"
#include "pipeline/refinement.h"

namespace quantmill {
namespace {

double mean(std::span<const float> values) {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Columns by falling diagonal; ties keep their order so that every rank agrees.
std::vector<std::int32_t> descending(std::span<const float> diagonal) {
    std::vector<std::int32_t> order(diagonal.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
        return diagonal[static_cast<std::size_t>(a)] > diagonal[static_cast<std::size_t>(b)];
    });
    return order;
}

// Columns of each group by falling diagonal, groups by their largest; a short last group stays where and as
// it is, as in GPTQModel.
std::vector<std::int32_t> group_aware(std::span<const float> diagonal, std::int64_t group_size) {
    const auto size = static_cast<std::size_t>(group_size);
    const std::size_t groups = diagonal.size() / size;
    std::vector<std::vector<std::int32_t>> inside;
    std::vector<float> largest;
    for (std::size_t g = 0; g < groups; ++g) {
        inside.push_back(descending(diagonal.subspan(g * size, size)));
        largest.push_back(diagonal[g * size + static_cast<std::size_t>(inside.back().front())]);
    }
    std::vector<std::int32_t> order;
    for (const std::int32_t g : descending(largest)) {
        for (const std::int32_t c : inside[static_cast<std::size_t>(g)])
            order.push_back(static_cast<std::int32_t>(g * group_size) + c);
    }
    while (order.size() < diagonal.size()) order.push_back(static_cast<std::int32_t>(order.size()));
    return order;
}

std::vector<std::int32_t> column_order(std::span<const float> diagonal, const GptqOptions& options) {
    if (options.desc_act) return descending(diagonal);
    if (options.act_group_aware) return group_aware(diagonal, options.grid.group_size);
    return {};
}

std::vector<std::int32_t> take_dead_columns(std::vector<float>& diagonal) {
    std::vector<std::int32_t> dead;
    for (std::size_t j = 0; j < diagonal.size(); ++j) {
        if (diagonal[j] != 0.0F) continue;
        dead.push_back(static_cast<std::int32_t>(j));
        diagonal[j] = 1.0F;
    }
    return dead;
}

std::vector<float> damped(std::span<const float> diagonal, double lambda) {
    std::vector<float> result(diagonal.begin(), diagonal.end());
    for (float& element : result) element = static_cast<float>(static_cast<double>(element) + lambda);
    return result;
}

// tr(H²) of a lower triangle, whose upper one is filled.
double trace_of_square(Backend& backend, TensorView h) {
    constexpr std::int64_t kRows = 256;
    backend.mirror_triangle(h);
    const std::int64_t columns = h.extent(0);
    Tensor zeros = backend.empty({std::min(kRows, columns), columns}, DType::f32, "zeros");
    backend.zero(zeros);
    double sum = 0.0;
    for (std::int64_t first = 0; first < columns; first += kRows) {
        const std::int64_t last = std::min(first + kRows, columns);
        const auto rows = backend.squared_distance(h.rows(first, last), zeros.view().rows(0, last - first));
        sum += std::accumulate(rows.begin(), rows.end(), 0.0);
    }
    return sum;
}

// Where damping begins; h: as it was accumulated.
double first_damping(Backend& backend, TensorView h, double mean_diagonal, std::int64_t tokens,
                     const GptqOptions& options) {
    if (!options.auto_damping) return options.damp_percent;
    const auto width = static_cast<double>(h.extent(0));
    return shrinkage_damping(mean_diagonal * width, trace_of_square(backend, h), static_cast<double>(tokens),
                             width);
}

}  // namespace

double shrinkage_damping(double trace, double trace_of_square, double tokens, double width) {
    const double spread = trace_of_square - trace * trace / width;
    const double rho =
        ((1.0 - 2.0 / width) * trace_of_square + trace * trace) / ((tokens + 1.0 - 2.0 / width) * spread);
    constexpr double kLeast = 0.01, kMost = 0.5;
    if (!(spread > 0.0) || !(rho < 1.0)) return kMost;
    return std::clamp(rho / (1.0 - rho), kLeast, kMost);
}

std::vector<std::int32_t> inverse_order(std::span<const std::int32_t> order) {
    std::vector<std::int32_t> result(order.size());
    for (std::size_t i = 0; i < order.size(); ++i) {
        result[static_cast<std::size_t>(order[i])] = static_cast<std::int32_t>(i);
    }
    return result;
}

FactorOutcome factor_hessian(Backend& backend, ConstTensorView sum, const FixedPointExponents& exponents,
                             std::int64_t tokens, const GptqOptions& options, const std::string& module,
                             TensorView factor) {
    const double scale = 2.0 / static_cast<double>(tokens);
    backend.from_fixed_point(sum, exponents, scale, factor);
    std::vector<float> diagonal = backend.read_diagonal(factor);
    const double mean_diagonal = mean(diagonal);
    if (!std::isfinite(mean_diagonal)) throw BadInput("{}: its calibration inputs are not finite", module);

    FactorOutcome outcome;
    outcome.dead_columns = take_dead_columns(diagonal);
    outcome.order = column_order(diagonal, options);

    outcome.few_tokens =
        static_cast<double>(tokens) < options.few_tokens * static_cast<double>(factor.extent(0));
    const double first = first_damping(backend, factor, mean_diagonal, tokens, options);
    for (double damp = first; damp < 1.0 && !outcome.few_tokens; damp += options.damp_auto_increment) {
        if (damp != first) backend.from_fixed_point(sum, exponents, scale, factor);
        backend.write_diagonal(damped(diagonal, damp * mean_diagonal), factor);
        if (!outcome.order.empty()) {
            Tensor natural = backend.empty(factor.shape(), DType::f32, "Hessian in natural order");
            backend.copy(factor, natural);
            backend.permute_symmetric(natural, outcome.order, factor);
        }
        outcome.damp_percent = damp;
        outcome.damping_raised = damp != first;
        if (backend.reverse_cholesky(factor)) return outcome;
        if (options.damp_auto_increment <= 0.0) break;
    }

    // The factor of a diagonal H couples no columns: every weight is rounded to its nearest code.
    outcome.round_to_nearest = true;
    outcome.order.clear();
    for (float& element : diagonal) element = std::sqrt(std::max(element, 0.0F));
    backend.zero(factor);
    backend.write_diagonal(diagonal, factor);
    return outcome;
}

void damped_hessian(Backend& backend, ConstTensorView sum, const FixedPointExponents& exponents,
                    std::int64_t tokens, const FactorOutcome& outcome, TensorView h) {
    backend.from_fixed_point(sum, exponents, 2.0 / static_cast<double>(tokens), h);
    std::vector<float> diagonal = backend.read_diagonal(h);
    const double lambda = outcome.damp_percent * mean(diagonal);
    take_dead_columns(diagonal);
    backend.write_diagonal(damped(diagonal, lambda), h);
    backend.mirror_triangle(h);
}

std::string serialize(const FactorOutcome& outcome) {
    const nlohmann::json json{outcome.damp_percent, outcome.damping_raised, outcome.round_to_nearest,
                              outcome.dead_columns, outcome.order,          outcome.few_tokens};
    return json.dump();
}

FactorOutcome deserialize_factor_outcome(const std::string& text) {
    const nlohmann::json json = nlohmann::json::parse(text);
    return {json.at(0), json.at(1), json.at(2), json.at(3), json.at(4), json.at(5)};
}

bool natural_groups(const GptqOptions& options) { return !options.desc_act || options.static_groups; }

std::vector<std::int32_t> group_index(const FactorOutcome& outcome, const GptqOptions& options,
                                      std::int64_t columns) {
    const bool natural = outcome.order.empty() || natural_groups(options);
    std::vector<std::int32_t> groups(static_cast<std::size_t>(columns));
    for (std::size_t j = 0; j < groups.size(); ++j) {
        const auto group = static_cast<std::int32_t>(static_cast<std::int64_t>(j) / options.grid.group_size);
        groups[natural ? j : static_cast<std::size_t>(outcome.order[j])] = group;
    }
    return groups;
}

namespace {

// The natural groups of the columns as they are walked.
std::vector<std::int32_t> walked_groups(const FactorOutcome& outcome, std::int64_t group_size,
                                        std::int64_t columns) {
    std::vector<std::int32_t> groups;
    for (std::int64_t j = 0; j < columns; ++j) {
        const std::int64_t column = outcome.order.empty() ? j : outcome.order[static_cast<std::size_t>(j)];
        groups.push_back(static_cast<std::int32_t>(column / group_size));
    }
    return groups;
}

// R_jj² of each column, in natural order.
std::vector<float> importance_of(Backend& backend, ConstTensorView factor, const FactorOutcome& outcome) {
    const std::vector<float> diagonal = backend.read_diagonal(factor);
    std::vector<float> importance(diagonal.size());
    for (std::size_t j = 0; j < diagonal.size(); ++j) {
        importance[outcome.order.empty() ? j : static_cast<std::size_t>(outcome.order[j])] =
            diagonal[j] * diagonal[j];
    }
    return importance;
}

// The solve of columns as they lie. Of static groups scales and zeros are there, of group-aware ones they
// come in the order of the walk and are put back.
void solve_in_order(Backend& backend, ConstTensorView weights, ConstTensorView factor,
                    const FactorOutcome& outcome, const GptqOptions& options, QuantizedViews out,
                    TensorView loss) {
    const std::int64_t group_size = options.grid.group_size;
    const std::vector<std::int32_t> groups = walked_groups(outcome, group_size, weights.extent(1));
    if (options.static_groups) {
        return backend.gptq_solve_static(weights, factor, groups, options.grid, out, loss);
    }
    if (outcome.order.empty() || !natural_groups(options)) {
        return backend.gptq_solve(weights, factor, options.grid, out, loss);
    }
    std::vector<std::int32_t> walked;
    for (std::size_t j = 0; j < groups.size(); j += static_cast<std::size_t>(group_size)) {
        walked.push_back(groups[j]);
    }
    Tensor scales = backend.empty(out.scales.shape(), DType::f16, "scales in the order of the walk");
    Tensor zeros = backend.empty(out.zeros.shape(), DType::u8, "zeros in the order of the walk");
    backend.gptq_solve(weights, factor, options.grid, {out.codes, scales, zeros}, loss);
    backend.permute_columns(scales, inverse_order(walked), out.scales);
    backend.permute_columns(zeros, inverse_order(walked), out.zeros);
}

}  // namespace

double propagated_alpha(const FactorOutcome& outcome, const GptqOptions& options) {
    return outcome.round_to_nearest ? 0.0 : options.error_propagation_alpha;
}

RowLosses solve_rows(Backend& backend, TensorView weights, RowRange range, ConstTensorView factor,
                     const FactorOutcome& outcome, const GptqOptions& options, QuantizedLinear& quantized,
                     ConstTensorView cross, ConstTensorView hessian) {
    if (range.empty()) return {};
    const std::int64_t columns = quantized.columns();
    const Shape shape{range.count(), columns};
    Tensor propagated;
    TensorView target = weights;
    if (const double alpha = propagated_alpha(outcome, options); alpha > 0.0) {
        // Before dead columns are cleared: on the original path they may be active.
        propagated = backend.empty(shape, DType::f32, "weights with their input's error");
        backend.propagate_error(weights, cross, factor, outcome.order, static_cast<float>(alpha), propagated);
        target = propagated;
    }
    if (!outcome.dead_columns.empty()) {
        backend.zero_columns(outcome.dead_columns, weights);
        if (!propagated.empty()) backend.zero_columns(outcome.dead_columns, target);
    }

    QuantizedViews out = quantized.rows(range.begin, range.end);
    Tensor loss = backend.empty({range.count()}, DType::f32, "loss of rows");
    if (options.static_groups) {
        backend.choose_grids(target, importance_of(backend, factor, outcome), options.grid, out);
    }
    if (outcome.order.empty()) {
        solve_in_order(backend, target, factor, outcome, options, out, loss);
    } else {
        Tensor ordered = backend.empty(shape, DType::f32, "weights in the order of the walk");
        Tensor codes = backend.empty(shape, DType::u8, "codes in the order of the walk");
        backend.permute_columns(target, outcome.order, ordered);
        solve_in_order(backend, ordered, factor, outcome, options, {codes, out.scales, out.zeros}, loss);
        backend.permute_columns(codes, inverse_order(outcome.order), out.codes);
    }
    if (refines(outcome, options)) refine_rows(backend, target, hessian, outcome, options, out, loss);

    Tensor dequantized = backend.empty(shape, DType::f32, "dequantized rows");
    backend.dequantize({out.codes, out.scales, out.zeros}, quantized.g_idx, dequantized);
    RowLosses losses;
    losses.squared_error = backend.squared_distance(weights, dequantized);
    std::vector<float> row_loss(static_cast<std::size_t>(range.count()));
    backend.copy_to_host(loss, row_loss.data());
    losses.loss.assign(row_loss.begin(), row_loss.end());
    return losses;
}

}  // namespace quantmill
