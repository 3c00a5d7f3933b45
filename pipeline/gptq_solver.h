#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "pipeline/hessian.h"
#include "pipeline/quantized_linear.h"

namespace quantmill {

struct GptqOptions {
    QuantizationGrid grid;
    bool desc_act = false;
    double damp_percent = 0.05;
    double damp_auto_increment = 0.01;  // 0: do not raise
    bool act_group_aware = false;  // falling diag H inside groups, groups by their largest; g_idx stays c / g
    bool static_groups = false;    // scales from the original weights, of groups c / g
    bool refit = false;            // of scales, after the solve and each sweep
    int sweeps = 0;                // of coordinate descent over codes
    double error_propagation_alpha = 0.0;  // 0: none
    double few_tokens = 0.0;    // fewer than this share of the width: H's diagonal alone is taken for known
    bool auto_damping = false;  // shrinkage_damping instead of damp_percent
    friend bool operator==(const GptqOptions&, const GptqOptions&) = default;
};

// What the factorization found and did; all of it goes to the report.
struct FactorOutcome {
    double damp_percent = 0.0;  // used in the end
    bool damping_raised = false;
    bool round_to_nearest = false;           // no damping below 1 made H positive definite
    std::vector<std::int32_t> dead_columns;  // H_jj = 0: never active in the calibration
    std::vector<std::int32_t> order;         // in which columns are solved; empty: natural
    bool few_tokens = false;                 // too few for more than H's diagonal; rounded to nearest, too
};

// Builds H = (2/tokens)·XᵀX + λI, λ = damp_percent · mean(diag), from the reduced fixed-point sum and factors
// it in `factor` f32 [C, C] as Backend::reverse_cholesky does. Dead columns get H_jj = 1 after the mean is
// taken. Damping rises by damp_auto_increment until the factorization succeeds; at 1 it falls back to a
// diagonal H, which is rounding to nearest; so do too few tokens. `module` is for messages; non-finite
// activations throw BadInput.
FactorOutcome factor_hessian(Backend& backend, ConstTensorView sum, const FixedPointExponents& exponents,
                             std::int64_t tokens, const GptqOptions& options, const std::string& module,
                             TensorView factor);

// Damping by oracle-approximating shrinkage (Chen, Wiesel, Eldar, Hero 2010) of a width x width Hessian with
// these tr(H) and tr(H²), as a share of its mean diagonal: ρ/(1 − ρ), kept between 0.01 and 0.5. The tokens
// count as independent, which those of a text are not, so it is a lower estimate.
double shrinkage_damping(double trace, double trace_of_square, double tokens, double width);

// The H that was factored, damped as it was in the end, both triangles, its columns in natural order.
void damped_hessian(Backend& backend, ConstTensorView sum, const FixedPointExponents& exponents,
                    std::int64_t tokens, const FactorOutcome& outcome, TensorView h);

// order[result[c]] = c.
std::vector<std::int32_t> inverse_order(std::span<const std::int32_t> order);

// Small message form, for the ranks that did not factor.
std::string serialize(const FactorOutcome& outcome);
FactorOutcome deserialize_factor_outcome(const std::string& text);

// Whether g_idx stays c / group_size, so that consumers need no kernels for act-order.
bool natural_groups(const GptqOptions& options);

// g_idx of a linear whose columns were solved in outcome.order: c / group_size, or with act-order column
// order[j] is in group j / group_size.
std::vector<std::int32_t> group_index(const FactorOutcome& outcome, const GptqOptions& options,
                                      std::int64_t columns);

struct RowLosses {
    std::vector<double> loss;           // a row: Σ_j (target_j − q_j)² R_jj²
    std::vector<double> squared_error;  // a row: Σ_j (w_j − q_j)²
};

// The share of its input's error that a linear makes up for: none when it was rounded to nearest.
double propagated_alpha(const FactorOutcome& outcome, const GptqOptions& options);

// Quantizes rows `range` of a group into the same rows of `quantized`. weights f32 [range.count(), C] holds
// those rows (changed: dead columns become 0); range begins at a multiple of kSolveRowBlock. `cross` is
// D = (2/tokens)·(X − X̃)ᵀX̃ f32 [C, C], needed when propagated_alpha is not 0: then the losses are those of
// the target W + alpha·W·D·H⁻¹, the squared errors still those of W. `hessian`: of damped_hessian, needed
// when rows are refined (refinement.h).
RowLosses solve_rows(Backend& backend, TensorView weights, RowRange range, ConstTensorView factor,
                     const FactorOutcome& outcome, const GptqOptions& options, QuantizedLinear& quantized,
                     ConstTensorView cross = {}, ConstTensorView hessian = {});

}  // namespace quantmill
