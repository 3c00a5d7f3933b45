#include "workers/live_line.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>

namespace quantmill {
namespace {

std::size_t terminal_width() {
    winsize size{};
    const bool known = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1;
    return known ? size.ws_col : std::size_t{80};
}

}  // namespace

bool has_live_line() { return isatty(STDERR_FILENO) == 1; }

std::string_view live_line_eraser() { return has_live_line() ? "\r\x1b[K" : ""; }

void show_live_line(std::string_view text) {
    // The last column stays free: some terminals wrap when it is written.
    fmt::print(stderr, "{}{}", live_line_eraser(), text.substr(0, terminal_width() - 1));
    std::fflush(stderr);
}

void clear_live_line() {
    fmt::print(stderr, "{}", live_line_eraser());
    std::fflush(stderr);
}

}  // namespace quantmill
