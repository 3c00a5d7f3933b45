#pragma once

#include <cstddef>
#include <string>

#include "pipeline/stopwatch.h"

namespace quantmill {

// What the user sees of a running job: on a terminal one live line, in a log file a line a block.
class Progress {
public:
    // `shown`: only rank 0 shows anything. `expected_seconds`: the plan's estimate, used until blocks have
    // been timed; 0: unknown.
    Progress(bool shown, int blocks, std::size_t stages, double expected_seconds);
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    void stage_done(int block, std::size_t stage, const std::string& name);
    void block_done(int block, const std::string& summary);

private:
    double remaining() const;

    bool shown_;
    bool terminal_;
    int blocks_;
    std::size_t stages_;
    double expected_seconds_;
    double done_ = 0.0;  // blocks, with the share of the current one
    Stopwatch watch_;
};

}  // namespace quantmill
