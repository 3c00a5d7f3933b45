#include "workers/cost_model.h"

#include <numeric>

#include "kernels/grid.h"

namespace quantmill {
namespace {

// Shares of the matrix product's rate that the stages were seen to reach, with all that goes with them
// (bench/RESULTS.md: CPU kernels; whole blocks on one H200), and what disks, memory, NVLink and networks
// usually carry.
struct Shares {
    double forward, attention, hessian, factor, solve;
    double disk, writing, link, network;
    double seconds_per_column;
    double squared_trial, power_trial;
    Rates::Refinement sweep, refit;
};
constexpr Shares kCpuShares{1.0, 0.4, 1.0, 0.5,  0.4,  5e8,        5e8,
                            3e9, 1e9, 0.0, 12.0, 60.0, {3.0, 0.0}, {2.0, 0.0}};
// The search's trials from their instructions, not yet from a clock.
constexpr Shares kCudaShares{0.96, 0.37, 0.77,   0.226, 0.19, 5e9,          1.5e9,
                             2e11, 4e10, 7.7e-7, 33.0,  93.0, {5.2, 4.3e4}, {0.0, 3.4e4}};

// Operations of a solve that the search for scales takes for each weight.
double search_work(const QuantizationGrid& grid, const Rates& rates) {
    if (grid.search == ScaleSearch::minmax) return 0.0;
    const Shrinks shrinks = shrinks_of(grid.search);
    const double trials = (shrinks.count + 2 * shrinks.around) * (tries_twins(grid) ? 2.0 : 1.0);
    return trials * (grid.search == ScaleSearch::mse ? rates.power_trial : rates.squared_trial);
}

}  // namespace

std::vector<StageWork> stage_work(const std::vector<Stage>& stages, const Attention& attention,
                                  double length) {
    std::vector<StageWork> work;
    for (const Stage& stage : stages) {
        const auto n = static_cast<double>(stage.group.columns());
        const auto rows = static_cast<double>(stage.group.rows());
        StageWork of_stage{2.0 * rows * n, 0.0, n * n, n * n * n / 3.0, rows * n * n, n, rows * n};
        if (stage.input == StageInput::attention) {
            of_stage.attention = 2.0 * length * static_cast<double>(attention.heads * attention.head_dim);
        }
        work.push_back(of_stage);
    }
    return work;
}

Rates rates_of(const std::string& backend, double products) {
    const Shares& shares = backend == "cuda" ? kCudaShares : kCpuShares;
    return {products * shares.forward,
            products * shares.attention,
            products * shares.hessian,
            products * shares.factor,
            products * shares.solve,
            shares.disk,
            0.0,
            shares.writing,
            shares.link,
            shares.network,
            shares.seconds_per_column,
            shares.squared_trial,
            shares.power_trial,
            shares.sweep,
            shares.refit};
}

double solve_work(const StageWork& work, const GptqOptions& options, const Rates& rates) {
    double solves = options.error_propagation_alpha > 0.0 ? kPropagatedSolve : 1.0;
    double trials = search_work(options.grid, rates);
    const auto refine = [&](double times, const Rates::Refinement& refinement) {
        solves += times * refinement.solves;
        trials += times * refinement.trials;
    };
    refine(options.sweeps, rates.sweep);
    if (options.refit) refine(options.sweeps + 1, rates.refit);
    return solves * work.solve + trials * work.weights;
}

Rates usual_rates(const std::string& backend) { return rates_of(backend, backend == "cuda" ? 7e14 : 2e11); }

double BlockCost::factors() const { return std::accumulate(factor.begin(), factor.end(), 0.0); }
double BlockCost::solves() const { return std::accumulate(solve.begin(), solve.end(), 0.0); }

BlockCost block_cost(const ModelGraph& graph, const Rates& rates, double tokens, double length,
                     const GptqOptions& options) {
    BlockCost cost;
    for (const StageWork& work : stage_work(graph.stages, graph.attention, length)) {
        cost.stream += tokens * (rates.forward_seconds(work) + work.hessian / rates.hessian);
        cost.factor.push_back(rates.factor_seconds(work));
        cost.solve.push_back(solve_work(work, options, rates) / rates.solve);
    }
    return cost;
}

}  // namespace quantmill
