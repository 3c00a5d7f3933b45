#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quantmill {

// What plan, report and messages share: numbers as people read them, columns, spelling.

std::string bytes_text(std::uint64_t bytes);  // "0 B", "513 kB", "39.8 GB": powers of 1000, as disks count
std::string seconds_text(double seconds);     // "80 ms", "4.2 s", "2.5 min", "3 h 05 min"
std::string count_text(std::int64_t count);   // "960", "135 M", "70.6 B": parameters, tokens
std::string list_text(const std::vector<std::string>& items);  // "a, b, c"

// Sorted unique indices folded into spans: {0, 1, 2, 5} gives "0-2,5"; nothing gives "-".
std::string spans_text(std::vector<std::int64_t> indices);

// Rows of cells as lines with two spaces between columns, each line after `indent` spaces. `alignments`
// has a letter a column: 'l' or 'r'. Cells may hold UTF-8; widths count code points.
std::string table_text(const std::vector<std::vector<std::string>>& rows, std::string_view alignments,
                       int indent = 0);

// Insertions, deletions and substitutions that turn one word into the other.
std::size_t edit_distance(std::string_view left, std::string_view right);

// True for words so close that one is probably a misspelling of the other.
bool looks_like(std::string_view word, std::string_view known);

// The known word that `word` looks like most, if any does.
std::optional<std::string> nearest_word(std::string_view word, const std::vector<std::string>& known);

}  // namespace quantmill
