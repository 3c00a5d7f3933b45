#include "jobs/text.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace quantmill {

namespace {

// Three significant digits, as a size or a rate is read: 9.96, 39.8, 141.
std::string three_digits(double value) {
    return fmt::format("{:.{}f}", value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

std::string scaled_text(double value, const std::array<const char*, 6>& units) {
    std::size_t unit = 0;
    // 999.5 would be shown as "1000".
    while (value >= 999.5 && unit + 1 < units.size()) {
        value /= 1000.0;
        ++unit;
    }
    if (unit == 0) return fmt::format("{:.0f}{}", value, units[0]);
    return three_digits(value) + units[unit];
}

std::size_t code_points(std::string_view text) {
    return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char byte) {
        return (static_cast<unsigned char>(byte) & 0xC0) != 0x80;
    }));
}

}  // namespace

std::string bytes_text(std::uint64_t bytes) {
    return scaled_text(static_cast<double>(bytes), {" B", " kB", " MB", " GB", " TB", " PB"});
}

std::string count_text(std::int64_t count) {
    return scaled_text(static_cast<double>(count), {"", " k", " M", " B", " T", " Q"});
}

std::string seconds_text(double seconds) {
    if (!std::isfinite(seconds)) return "unknown";
    if (seconds < 0.9995) return fmt::format("{:.0f} ms", seconds * 1000.0);
    if (seconds < 9.95) return fmt::format("{:.1f} s", seconds);
    if (seconds < 119.5) return fmt::format("{:.0f} s", seconds);
    if (seconds < 597.0) return fmt::format("{:.1f} min", seconds / 60.0);
    const auto minutes = std::llround(seconds / 60.0);
    if (minutes < 60) return fmt::format("{} min", minutes);
    return fmt::format("{} h {:02} min", minutes / 60, minutes % 60);
}

std::string list_text(const std::vector<std::string>& items) {
    return fmt::format("{}", fmt::join(items, ", "));
}

std::string spans_text(std::vector<std::int64_t> indices) {
    if (indices.empty()) return "-";
    std::sort(indices.begin(), indices.end());
    std::string text;
    for (std::size_t begin = 0, end; begin < indices.size(); begin = end) {
        end = begin + 1;
        while (end < indices.size() && indices[end] == indices[end - 1] + 1) ++end;
        if (!text.empty()) text += ',';
        text += std::to_string(indices[begin]);
        if (end - begin > 1) text += '-' + std::to_string(indices[end - 1]);
    }
    return text;
}

std::string table_text(const std::vector<std::vector<std::string>>& rows, std::string_view alignments,
                       int indent) {
    std::vector<std::size_t> widths(alignments.size(), 0);
    for (const auto& row : rows)
        for (std::size_t column = 0; column < row.size(); ++column)
            widths.at(column) = std::max(widths[column], code_points(row[column]));
    std::string text;
    for (const auto& row : rows) {
        std::string line(static_cast<std::size_t>(indent), ' ');
        for (std::size_t column = 0; column < row.size(); ++column) {
            const std::string padding(widths[column] - code_points(row[column]), ' ');
            line += alignments[column] == 'r' ? padding + row[column] : row[column] + padding;
            line += "  ";
        }
        line.erase(line.find_last_not_of(' ') + 1);
        text += line + '\n';
    }
    return text;
}

std::size_t edit_distance(std::string_view left, std::string_view right) {
    std::vector<std::size_t> costs(right.size() + 1);  // of the prefix of `left` seen so far
    std::iota(costs.begin(), costs.end(), std::size_t{0});
    for (std::size_t i = 0; i < left.size(); ++i) {
        std::size_t diagonal = costs[0];
        costs[0] = i + 1;
        for (std::size_t j = 0; j < right.size(); ++j) {
            const std::size_t substituted = diagonal + (left[i] == right[j] ? 0 : 1);
            diagonal = costs[j + 1];
            costs[j + 1] = std::min({substituted, costs[j] + 1, diagonal + 1});
        }
    }
    return costs.back();
}

bool looks_like(std::string_view word, std::string_view known) {
    return edit_distance(word, known) <= std::max<std::size_t>(1, known.size() / 3);
}

std::optional<std::string> nearest_word(std::string_view word, const std::vector<std::string>& known) {
    const auto nearest = std::min_element(known.begin(), known.end(), [&](const auto& a, const auto& b) {
        return edit_distance(word, a) < edit_distance(word, b);
    });
    if (nearest == known.end() || !looks_like(word, *nearest)) return std::nullopt;
    return *nearest;
}

}  // namespace quantmill
