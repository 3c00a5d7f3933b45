#pragma once

#include "pipeline/gptq_solver.h"

namespace quantmill {

// Whether linears are refined after their solves: one that was rounded to nearest is not.
bool refines(const GptqOptions& options);
bool refines(const FactorOutcome& outcome, const GptqOptions& options);

// options.sweeps sweeps over the codes of solved rows, and with options.refit a fit of their scales before
// the first and after each. target f32 [R, C]: the weights that were solved for; hessian: of damped_hessian.
// `out` changes, and loss f32 [R] becomes that of what it holds then.
void refine_rows(Backend& backend, ConstTensorView target, ConstTensorView hessian,
                 const FactorOutcome& outcome, const GptqOptions& options, QuantizedViews out,
                 TensorView loss);

}  // namespace quantmill
