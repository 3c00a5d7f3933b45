#pragma once

#include <string_view>

namespace quantmill {

// Whether stderr is a terminal, which gets one line written over and over; anything else gets a log.
bool has_live_line();
// Control characters that take the live line away, for what is printed in its place; empty without one.
std::string_view live_line_eraser();
// Writes the live line, cut to the terminal's width: a longer one would wrap and stay behind.
void show_live_line(std::string_view text);
void clear_live_line();

}  // namespace quantmill
