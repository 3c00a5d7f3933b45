#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "pipeline/gptq_solver.h"
#include "pipeline/model_graph.h"

namespace quantmill {

// Operations that a stage of a block takes (docs/algorithm.md, "What it costs").
struct StageWork {
    double forward = 0.0;    // a token; attention is with the stage that makes it
    double attention = 0.0;  // a token
    double hessian = 0.0;    // a token, one triangle
    double factor = 0.0;
    double solve = 0.0;
    double columns = 0.0;  // of the factor, which follow each other
    double weights = 0.0;
};
// What error propagation makes of a stage's `hessian` and `solve`: (X − X̃)ᵀX̃ has no symmetry to save by, and
// rows meet three more matrices of half or all n².
inline constexpr double kPropagatedHessian = 3.0;
inline constexpr double kPropagatedSolve = 5.0;
// `length`: tokens of a sequence, for attention.
std::vector<StageWork> stage_work(const std::vector<Stage>& stages, const Attention& attention,
                                  double length);

// What one rank reaches in operations a second, and what the ways between ranks carry in bytes a second.
struct Rates {
    double forward = 0.0, attention = 0.0, hessian = 0.0, factor = 0.0, solve = 0.0;
    double disk = 0.0;                // of a host, reading and writing
    double reading = 0.0;             // of a rank, its weights; 0: its share of the disk
    double writing = 0.0;             // of a rank, which packs and writes with one thread
    double link = 0.0;                // of a rank, to ranks of its host
    double network = 0.0;             // of a rank, to ranks of other hosts
    double seconds_per_column = 0.0;  // of a factor, beside its operations
    // Operations of a solve that trying one scale takes for one weight, its error squared or to a power.
    double squared_trial = 0.0, power_trial = 0.0;
    // A sweep over codes, or a fit of scales: as many solves of the same rows, and operations a weight.
    struct Refinement {
        double solves = 0.0, trials = 0.0;
    };
    Refinement sweep{}, refit{};

    double forward_seconds(const StageWork& work) const {  // a token
        return work.forward / forward + work.attention / attention;
    }
    double factor_seconds(const StageWork& work) const {
        return work.factor / factor + work.columns * seconds_per_column;
    }
};
// Operations of solving a stage: the walk over its columns, error propagation, the search for scales,
// refinement.
double solve_work(const StageWork& work, const GptqOptions& options, const Rates& rates);
// Rates of a rank of backend `backend` whose matrix products reach `products` operations a second.
Rates rates_of(const std::string& backend, double products);
// Those that such a rank usually has: who does what is chosen by them, and not by what was measured, so that
// a job is shared out alike in every run.
Rates usual_rates(const std::string& backend);

// Seconds that a rank needs for the parts of one block.
struct BlockCost {
    double stream = 0.0;                // forward and Hessians of `tokens` tokens
    std::vector<double> factor, solve;  // a stage
    double factors() const;
    double solves() const;
};
BlockCost block_cost(const ModelGraph& graph, const Rates& rates, double tokens, double length,
                     const GptqOptions& options = {});

}  // namespace quantmill
