#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace quantmill {

// How far hidden states [T, hidden_size] are from those of a reference, token by token.
class HiddenErrors {
public:
    HiddenErrors(Backend& backend, std::int64_t hidden_size);

    // Calls visit(token, ||h − h_ref||², ||h_ref||²) for all tokens in order.
    template <class Visit>
    void each(ConstTensorView hidden, ConstTensorView reference, const Visit& visit) {
        for (std::int64_t first = 0; first < hidden.extent(0); first += kRows) {
            const std::int64_t last = std::min(first + kRows, hidden.extent(0));
            const Rows rows = compare(hidden.rows(first, last), reference.rows(first, last));
            for (std::size_t r = 0; r < rows.errors.size(); ++r) {
                visit(static_cast<std::size_t>(first) + r, rows.errors[r], rows.squares[r]);
            }
        }
    }

private:
    static constexpr std::int64_t kRows = 512;
    struct Rows {
        std::vector<double> errors, squares;
    };
    Rows compare(ConstTensorView hidden, ConstTensorView reference);

    Backend& backend_;
    Tensor ours_, theirs_, zeros_;  // f32 [kRows, hidden_size]
};

}  // namespace quantmill
