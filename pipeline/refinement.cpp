#include "pipeline/refinement.h"

namespace quantmill {
namespace {

// All operands in an order of columns in which groups lie together.
void refine_in_order(Backend& backend, ConstTensorView target, ConstTensorView hessian,
                     const GptqOptions& options, QuantizedViews out, TensorView loss) {
    if (options.refit) backend.refit_scales(target, hessian, options.grid, out);
    for (int sweep = 0; sweep < options.sweeps; ++sweep) {
        backend.sweep_codes(target, hessian, options.grid, out);
        if (options.refit) backend.refit_scales(target, hessian, options.grid, out);
    }
    backend.quadratic_loss(target, hessian, options.grid, out, loss);
}

}  // namespace

bool refines(const GptqOptions& options) { return options.refit || options.sweeps > 0; }

bool refines(const FactorOutcome& outcome, const GptqOptions& options) {
    return refines(options) && !outcome.round_to_nearest;
}

void refine_rows(Backend& backend, ConstTensorView target, ConstTensorView hessian,
                 const FactorOutcome& outcome, const GptqOptions& options, QuantizedViews out,
                 TensorView loss) {
    if (outcome.order.empty() || natural_groups(options)) {
        return refine_in_order(backend, target, hessian, options, out, loss);
    }
    Tensor weights = backend.empty(target.shape(), DType::f32, "weights in the order of the walk");
    Tensor codes = backend.empty(target.shape(), DType::u8, "codes in the order of the walk");
    Tensor ordered = backend.empty(hessian.shape(), DType::f32, "Hessian in the order of the walk");
    backend.permute_columns(target, outcome.order, weights);
    backend.permute_columns(out.codes, outcome.order, codes);
    backend.permute_symmetric(hessian, outcome.order, ordered);
    backend.mirror_triangle(ordered);
    refine_in_order(backend, weights, ordered, options, {codes, out.scales, out.zeros}, loss);
    backend.permute_columns(codes, inverse_order(outcome.order), out.codes);
}

}  // namespace quantmill
