#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/control.h"
#include "pipeline/stopwatch.h"

namespace quantmill {

// What a rank last said of itself, and how fresh that is.
struct RankState {
    std::string host;
    std::string doing = "starting";  // "streaming, micro-batch 3 of 32"
    int group = 0;
    double done = 0.0;       // share of its work, 0 … 1
    double idle = 0.0;       // seconds without a report and without waiting for a peer
    double unchanged = 0.0;  // seconds without a report
    double silent = 0.0;     // seconds since this rank heard of it
    bool failed = false;     // it threw, and says why itself
};

// Why a job must end, or nothing: a rank that is neither working nor waiting for longer than `timeout`
// seconds, or ranks that all wait for each other.
std::string find_stall(const std::vector<RankState>& states, double timeout);

// One line for all groups: what their slowest rank does, and how far it is.
std::string progress_text(const std::vector<RankState>& states);

// Watches over the ranks of a job by a thread beside the work: every rank tells rank 0 what it does, and rank
// 0 tells the others that it lives. A rank that stalls or is killed ends the job on all ranks with who, where
// and doing what. Without thread support of the MPI library nobody is watched.
class Coordinator {
public:
    // `stall_timeout` in seconds; `shown`: rank 0 shows the progress of the groups. Collective.
    Coordinator(Control& control, double stall_timeout, bool shown);
    ~Coordinator();
    Coordinator(const Coordinator&) = delete;
    Coordinator& operator=(const Coordinator&) = delete;

    void set_group(int group);
    // What this rank begins to do, and the share of its work that is done.
    void report(std::string doing, double done);
    // Ends the watch: nobody is missed from here on. Collective.
    void finish();

private:
    void watch();
    void send_state(bool failed);
    void take_mail();
    void check();
    void show();
    void stop();
    [[noreturn]] void end_from_outside();
    RankState own_state() const;
    std::vector<RankState> states() const;

    Control& control_;
    double stall_timeout_;
    bool shown_;
    bool terminal_;
    std::vector<std::string> hosts_;  // of all ranks

    mutable std::mutex mutex_;  // of the state of this rank
    RankState own_;
    Stopwatch reported_;

    // Of the watching thread.
    std::vector<RankState> heard_;
    std::vector<Stopwatch> heard_at_;
    Stopwatch sent_, shown_at_, running_;
    double shown_share_ = 0.0;
    std::atomic<bool> ending_{false};
    int exceptions_at_start_;
    std::thread thread_;
};

}  // namespace quantmill
