#pragma once

#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace quantmill {

// Seconds this rank spent on a stage.
struct StageSeconds {
    double forward = 0.0, hessian = 0.0, factor = 0.0, solve = 0.0;
};

// Measures stages on the device's own clock, so that nobody has to wait for asynchronous operations.
class StageClock {
public:
    explicit StageClock(Backend& backend) : backend_(backend) {}

    void start() { last_ = backend_.record(); }
    // What was given to the backend since start or the last lap counts as `stage`.
    void lap(double StageSeconds::* stage) {
        EventPtr now = backend_.record();
        laps_.push_back({stage, std::exchange(last_, now), now});
    }
    // The seconds since the last call; waits for the last lap.
    StageSeconds take() {
        StageSeconds seconds;
        for (const Lap& lap : laps_) seconds.*lap.stage += lap.end->seconds_since(*lap.begin);
        laps_.clear();
        return seconds;
    }

private:
    struct Lap {
        double StageSeconds::* stage;
        EventPtr begin, end;
    };

    Backend& backend_;
    EventPtr last_;
    std::vector<Lap> laps_;
};

}  // namespace quantmill
