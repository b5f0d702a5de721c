// Sums over the windows of a pyramid's pools, of kChannels channels of one image, from one reading of its rows.
#pragma once

#include "common/arena.h"
#include "common/rows.h"
#include "pyramid_pool/pyramid_pool.h"
#include "pyramid_pool/pyramid_pool_math.h"

namespace bcmfnet::BCM_ISA {

static inline void add_floats(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load<Float>(to + i) + load<Float>(from + i), kLanes);
}

// The windows of one pooled map.
struct Windows {
  int64_t padding, stride;
  int64_t height, width;  // of the pooled map
  float weight;           // of an element in the average

  Range<int64_t> positions(int64_t window, int64_t size) const { return covered_by(window, stride, padding, size); }
  Range<int64_t> over_row(int64_t row) const { return covering(row, stride, padding, height); }

  // At most so many rows of windows have one row of the map in common.
  int64_t overlap() const { return smaller_of(2 * padding / stride + 1, height); }
};

static inline Windows windows_of(const Pyramid& pyramid, int map) {
  if (map < pyramid.pools) {
    const Pool& pool = pyramid.pool[map];
    const float area = static_cast<float>(pool.kernel) * static_cast<float>(pool.kernel);
    return {pool.padding, pool.stride, pool.height, pool.width, 1.0f / area};
  }
  const int64_t size = larger_of(pyramid.height, pyramid.width);
  return {size, size, 1, 1, 1.0f / (static_cast<float>(pyramid.height) * static_cast<float>(pyramid.width))};
}

// What is in hand of an image, kChannels floats for each pixel: a row of it, and of each pooled map the rows whose
// windows have that row.
struct WindowRows {
  const Pyramid& pyramid;
  const int maps;
  Windows windows[kMaxMaps];
  float* rows[kMaxMaps];
  float* line;    // [width, kChannels]: a row of any pooled map, for a moment
  float* pixels;  // [width, kChannels]: a row of the image. It is not next to `line`: 4 KiB apart, they would collide.

  WindowRows(const Pyramid& pyramid, Arena& arena)
      : pyramid(pyramid), maps(pyramid.pools + 1), line(arena.take<float>(pyramid.width * kChannels)) {
    for (int map = 0; map < maps; ++map) {
      windows[map] = windows_of(pyramid, map);
      rows[map] = arena.take<float>(windows[map].overlap() * windows[map].width * kChannels);
    }
    pixels = arena.take<float>(pyramid.width * kChannels);
  }

  float* row(int map, int64_t window) const {
    return rows[map] + window % windows[map].overlap() * windows[map].width * kChannels;
  }

  template <typename Done>
  void add(int64_t y, const Done& done) const;
};

// Add row y of the image, which `pixels` holds, from the first row to the last; done(map, window) where a row of
// windows is complete.
template <typename Done>
void WindowRows::add(int64_t y, const Done& done) const {
  constexpr int kVectors = kChannels / kLanes;
  for (int map = 0; map < maps; ++map) {
    const Windows of = windows[map];
    const float* const from = pixels;
    float* const sums = line;
    const Range<int64_t> over = of.over_row(y);
    if (over.begin >= over.end) continue;
    for (int64_t x = 0; x < of.width; ++x) {
      Float sum[kVectors] = {};
      const Range<int64_t> columns = of.positions(x, pyramid.width);
      for (int64_t column = columns.begin; column < columns.end; ++column)
        for (int v = 0; v < kVectors; ++v) sum[v] += load<Float>(from + column * kChannels + v * kLanes);
      for (int v = 0; v < kVectors; ++v) store(sums + x * kChannels + v * kLanes, sum[v], kLanes);
    }
    const int64_t count = of.width * kChannels;
    for (int64_t window = over.begin; window < over.end; ++window) {
      float* const to = row(map, window);
      if (of.positions(window, pyramid.height).begin == y) {
        std::memcpy(to, sums, sizeof(float) * count);
      } else {
        add_floats(sums, count, to);
      }
    }
    for (int64_t window = over.begin; window < over.end; ++window)
      if (of.positions(window, pyramid.height).end == y + 1) done(map, window);
  }
}

}  // namespace bcmfnet::BCM_ISA
