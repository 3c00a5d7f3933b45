#include "workers/hidden_errors.h"

namespace quantmill {

HiddenErrors::HiddenErrors(Backend& backend, std::int64_t hidden_size)
    : backend_(backend),
      ours_(backend, {kRows, hidden_size}, DType::f32, "hidden states"),
      theirs_(backend, {kRows, hidden_size}, DType::f32, "hidden states of the reference"),
      zeros_(backend, {kRows, hidden_size}, DType::f32, "zeros") {
    backend.zero(zeros_);
}

HiddenErrors::Rows HiddenErrors::compare(ConstTensorView hidden, ConstTensorView reference) {
    const TensorView ours = ours_.view().leading(hidden.shape());
    const TensorView theirs = theirs_.view().leading(hidden.shape());
    backend_.convert(hidden, ours);
    backend_.convert(reference, theirs);
    return {backend_.squared_distance(ours, theirs),
            backend_.squared_distance(theirs, zeros_.view().leading(hidden.shape()))};
}

}  // namespace quantmill
