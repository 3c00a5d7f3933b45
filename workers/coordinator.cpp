#include "workers/coordinator.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "jobs/text.h"
#include "workers/live_line.h"

namespace quantmill {
namespace {

constexpr auto kTick = std::chrono::milliseconds(20);
// Seconds between two reports of a rank: rank 0 must keep up with thousands of them.
double beat(int ranks) { return std::max(0.1, 1e-3 * ranks); }
// Seconds that a launcher which kills all ranks leaves between SIGTERM and SIGKILL, with some to spare: time
// enough to notice which rank fell silent first.
constexpr double kLastWords = 0.6;

volatile std::sig_atomic_t asked_to_end = 0;

void note_signal(int) { asked_to_end = 1; }

std::string place(std::size_t rank, const RankState& state) {
    return fmt::format("rank {} on {}", rank, state.host);
}

}  // namespace

std::string find_stall(const std::vector<RankState>& states, double timeout) {
    for (std::size_t rank = 0; rank < states.size(); ++rank) {
        const RankState& state = states[rank];
        const double lifeless = state.silent + state.idle;
        if (lifeless <= timeout) continue;
        return fmt::format("{} has stalled: no sign of life for {} (compute.stall_timeout). Last seen: {}",
                           place(rank, state), seconds_text(lifeless), state.doing);
    }
    // As they say themselves: a rank that has fallen silent does not wait, and is named a moment later.
    const auto waits = [timeout](const RankState& s) { return s.unchanged > timeout; };
    if (!std::all_of(states.begin(), states.end(), waits)) return "";
    std::string text = "all ranks wait for each other (compute.stall_timeout):";
    for (std::size_t rank = 0; rank < states.size(); ++rank) {
        text += fmt::format("\n  {}: {}", place(rank, states[rank]), states[rank].doing);
    }
    return text;
}

std::string progress_text(const std::vector<RankState>& states) {
    std::map<int, const RankState*> slowest;  // by group
    double done = 0.0;
    for (const RankState& state : states) {
        done += state.done / static_cast<double>(states.size());
        const RankState*& of_group = slowest[state.group];
        if (of_group == nullptr || state.done < of_group->done) of_group = &state;
    }
    std::string text = fmt::format("{:3.0f}%", 100.0 * done);
    constexpr std::size_t kShown = 4;
    std::size_t shown = 0;
    for (const auto& [group, state] : slowest) {
        if (slowest.size() > kShown && shown == kShown - 1 && group != slowest.rbegin()->first) continue;
        text += slowest.size() == 1
                    ? fmt::format("  {}", state->doing)
                    : fmt::format("  group {} {:.0f}% {}", group, 100.0 * state->done, state->doing);
        ++shown;
    }
    return text;
}

Coordinator::Coordinator(Control& control, double stall_timeout, bool shown)
    : control_(control),
      stall_timeout_(stall_timeout),
      shown_(shown && control.rank() == 0),
      terminal_(has_live_line()),
      hosts_(control.all_gather(control.host())),
      heard_(hosts_.size()),
      heard_at_(hosts_.size()),
      exceptions_at_start_(std::uncaught_exceptions()) {
    own_.host = control.host();
    for (std::size_t rank = 0; rank < hosts_.size(); ++rank) heard_[rank].host = hosts_[rank];
    if (control.size() > 1 && !control.has_mail() && control.rank() == 0) {
        spdlog::warn(
            "this MPI library lets only one thread call it: ranks that stall are found only when "
            "QUANTMILL_TIMEOUT has passed");
    }
    if (control.has_mail() && control.size() > 1) std::signal(SIGTERM, note_signal);
    thread_ = std::thread([this] { watch(); });
}

Coordinator::~Coordinator() { stop(); }

void Coordinator::stop() {
    if (!thread_.joinable()) return;
    ending_ = true;
    thread_.join();
    if (shown_ && terminal_) clear_live_line();
    // The others would otherwise blame this rank for falling silent.
    if (std::uncaught_exceptions() > exceptions_at_start_) send_state(true);
}

void Coordinator::finish() {
    control_.barrier();
    stop();
    if (control_.has_mail() && control_.size() > 1) std::signal(SIGTERM, SIG_DFL);
    control_.drop_mail();
}

void Coordinator::set_group(int group) {
    const std::lock_guard lock(mutex_);
    own_.group = group;
}

void Coordinator::report(std::string doing, double done) {
    spdlog::debug("{}", doing);
    const std::lock_guard lock(mutex_);
    own_.doing = std::move(doing);
    own_.done = done;
    reported_.restart();
}

RankState Coordinator::own_state() const {
    const std::lock_guard lock(mutex_);
    RankState state = own_;
    state.unchanged = reported_.seconds();
    state.idle = control_.size() > 1 ? std::min(state.unchanged, seconds_since_poll()) : state.unchanged;
    return state;
}

std::vector<RankState> Coordinator::states() const {
    std::vector<RankState> states = heard_;
    for (std::size_t rank = 0; rank < states.size(); ++rank) states[rank].silent = heard_at_[rank].seconds();
    RankState& own = states[static_cast<std::size_t>(control_.rank())];
    own = own_state();
    return states;
}

void Coordinator::watch() {
    send_state(false);
    Stopwatch tick;
    while (!ending_) {
        std::this_thread::sleep_for(kTick);
        // After a pause of this process itself nobody's silence means anything.
        if (tick.restart() > 5.0) std::fill(heard_at_.begin(), heard_at_.end(), Stopwatch());
        if (asked_to_end != 0) end_from_outside();
        take_mail();
        if (sent_.seconds() > beat(control_.size())) send_state(false);
        check();
        if (shown_) show();
    }
}

void Coordinator::send_state(bool failed) {
    sent_.restart();
    if (!control_.has_mail()) return;
    const RankState own = own_state();
    const nlohmann::json json{own.doing, own.group, own.done, own.idle, own.unchanged, failed};
    const std::string text = json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    if (control_.rank() != 0) {
        control_.post(text, 0);
        return;
    }
    for (int peer = 1; peer < control_.size(); ++peer) control_.post(text, peer);
}

void Coordinator::take_mail() {
    while (const auto mail = control_.next_mail()) {
        const nlohmann::json json = nlohmann::json::parse(mail->text);
        const auto rank = static_cast<std::size_t>(mail->from);
        heard_[rank] = {hosts_[rank], json.at(0), json.at(1), json.at(2),
                        json.at(3),   json.at(4), 0.0,        json.at(5)};
        heard_at_[rank].restart();
    }
}

// Rank 0 watches all, the others watch rank 0.
void Coordinator::check() {
    if (!control_.has_mail() || control_.size() == 1) return;
    std::vector<RankState> watched = states();
    if (control_.rank() != 0) watched.resize(1);
    if (control_.rank() != 0 && watched[0].silent + watched[0].idle <= stall_timeout_) return;
    const std::string stall = find_stall(watched, stall_timeout_);
    if (stall.empty()) return;
    spdlog::error("{}", stall);
    control_.abort(ExitCode::infrastructure);
}

// A launcher ends all ranks when it has lost one, without a word about what that one did: say it. Of rank 0
// two ranks say it, since one of them may be caught in a message from it.
void Coordinator::end_from_outside() {
    const Stopwatch since;
    while (since.seconds() < kLastWords) {
        take_mail();
        send_state(false);
        std::this_thread::sleep_for(kTick);
    }
    const auto lost = [&](std::size_t rank, const RankState& state) {
        return rank != static_cast<std::size_t>(control_.rank()) && !state.failed &&
               state.silent > kLastWords - 2 * beat(control_.size());
    };
    const std::vector<RankState> all = states();
    const bool explained =
        std::any_of(all.begin(), all.end(), [](const RankState& state) { return state.failed; });
    const std::size_t watched = control_.rank() == 0 ? all.size() : 1;
    for (std::size_t rank = 0; rank < watched && !explained; ++rank) {
        if (!lost(rank, all[rank]) || control_.rank() > 2) continue;
        spdlog::error("{} was lost: killed, or its host is gone. Last seen: {}", place(rank, all[rank]),
                      all[rank].doing);
    }
    std::fflush(nullptr);
    std::_Exit(128 + SIGTERM);
}

// On a terminal a live line; in a log file a line each tenth of the way, and at least every five minutes.
void Coordinator::show() {
    const double since = shown_at_.seconds();
    if (since < (terminal_ ? 0.5 : 5.0)) return;
    const std::vector<RankState> all = states();
    double share = 0.0;
    for (const RankState& state : all) share += state.done / static_cast<double>(all.size());
    if (!terminal_ && share < shown_share_ + 0.1 && since < 300.0) return;
    shown_at_.restart();
    shown_share_ = share;
    const double elapsed = running_.seconds();
    const std::string left =
        share > 0.02 ? fmt::format("  about {} left", seconds_text(elapsed / share * (1.0 - share))) : "";
    if (terminal_) {
        show_live_line(fmt::format("{}  {} elapsed{}", progress_text(all), seconds_text(elapsed), left));
    } else {
        spdlog::info("{}  {} elapsed{}", progress_text(all), seconds_text(elapsed), left);
    }
}

}  // namespace quantmill
