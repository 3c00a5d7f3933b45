#include "workers/progress.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "jobs/text.h"
#include "workers/live_line.h"

namespace quantmill {

Progress::Progress(bool shown, int blocks, std::size_t stages, double expected_seconds)
    : shown_(shown),
      terminal_(has_live_line()),
      blocks_(blocks),
      stages_(stages),
      expected_seconds_(expected_seconds) {}

Progress::~Progress() {
    if (shown_ && terminal_) clear_live_line();
}

// Blocks cost alike, so what is done predicts the rest; until a block is done, the plan knows better.
double Progress::remaining() const {
    const double elapsed = watch_.seconds();
    if (done_ < 1.0 && expected_seconds_ > elapsed) return expected_seconds_ - elapsed;
    return done_ == 0.0 ? 0.0 : elapsed / done_ * (blocks_ - done_);
}

void Progress::stage_done(int block, std::size_t stage, const std::string& name) {
    done_ = block + static_cast<double>(stage + 1) / static_cast<double>(stages_);
    if (!shown_ || !terminal_) return;
    show_live_line(fmt::format("block {}/{}  {:<8}  {} elapsed  about {} left", block + 1, blocks_, name,
                               seconds_text(watch_.seconds()), seconds_text(remaining())));
}

void Progress::block_done(int block, const std::string& summary) {
    done_ = block + 1;
    if (!shown_ || terminal_) return;
    spdlog::info("block {}/{}  {}  {} elapsed  about {} left", block + 1, blocks_, summary,
                 seconds_text(watch_.seconds()), seconds_text(remaining()));
}

}  // namespace quantmill
