#pragma once

#include <algorithm>
#include <cstdint>

namespace quantmill {

inline std::int64_t tile_count(std::int64_t extent, std::int64_t tile) { return (extent + tile - 1) / tile; }

// The tile that cuts an extent into equal pieces of at most `limit`, rounded up to whole vectors.
inline std::int64_t even_tile(std::int64_t extent, std::int64_t limit) {
    constexpr std::int64_t kVector = 16;
    const std::int64_t pieces = std::max<std::int64_t>(1, tile_count(extent, limit));
    return std::max(kVector, tile_count(tile_count(extent, pieces), kVector) * kVector);
}

}  // namespace quantmill
