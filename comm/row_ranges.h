#pragma once

#include <span>

#include "comm/communicator.h"

namespace quantmill {

// Preconditions that all communicators share; both throw InternalError.
void require_disjoint(std::span<const RowRange> ranges, int ranks, const Shape& shape);
void require_integers(const TensorView& sum);

}  // namespace quantmill
