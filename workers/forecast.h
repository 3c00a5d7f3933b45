#pragma once

#include <string>

#include "jobs/plan.h"
#include "workers/layer_planner.h"

namespace quantmill {

// What a placement takes and gains, by counted operations and bytes over rates.
struct Forecast {
    PlannedTime time;
    PlannedLayers layers;
};

// All ranks work on the same block: sequences are split over all, rows over those of a group of `layers`.
Forecast forecast_quantized(const PlannedWork& work, const World& world, const Rates& rates,
                            const LayerPlan& layers, bool true_sequential);
// Groups of ranks work on their own blocks.
Forecast forecast_original(const PlannedWork& work, const World& world, const Rates& rates,
                           const LayerPlan& layers);
// As the job says.
Forecast forecast(const PreparedJob& job, const PlannedWork& work, const World& world, const Rates& rates,
                  const LayerPlan& layers);

}  // namespace quantmill
