// The windows of a pyramid's pools, and their sums over kChannels channels of one image, from one reading of its rows.
#pragma once

#include "common/rows.h"
#include "pyramid_pool/pyramid_pool.h"

namespace bcmfnet::BCM_LEVEL {

constexpr int kMaps = kMaxPools + 1;

static inline void add_floats(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load<Float>(to + i) + load<Float>(from + i), kLanes);
}

// The windows of one pool along both axes, of which the global average is one that is larger than any map.
struct Windows {
  int64_t padding, stride;
  int64_t height, width;  // how many there are
  float share;            // of an element in the average

  int64_t begin(int64_t window) const { return window * stride > padding ? window * stride - padding : 0; }
  int64_t end(int64_t window, int64_t size) const {
    const int64_t end = window * stride + padding + 1;
    return end < size ? end : size;
  }

  // The windows of rows [begin_over, end_over) that have a row.
  int64_t begin_over(int64_t row) const { return row > padding ? (row - padding + stride - 1) / stride : 0; }
  int64_t end_over(int64_t row) const {
    const int64_t end = (row + padding) / stride + 1;
    return end < height ? end : height;
  }

  // At most so many windows have one row.
  int64_t overlap() const {
    const int64_t most = 2 * padding / stride + 1;
    return most < height ? most : height;
  }

  int64_t floats() const { return overlap() * width * kChannels; }  // of the rows whose windows have one row
};

static inline Windows windows_of(const Pyramid& pyramid, int map) {
  if (map < pyramid.pools) {
    const Pool& pool = pyramid.pool[map];
    const float area = static_cast<float>(pool.kernel) * static_cast<float>(pool.kernel);
    return {pool.padding, pool.stride, pool.height, pool.width, 1.0f / area};
  }
  const int64_t size = pyramid.height > pyramid.width ? pyramid.height : pyramid.width;
  return {size, size, 1, 1, 1.0f / (static_cast<float>(pyramid.height) * static_cast<float>(pyramid.width))};
}

// Rows of the maps that are in hand, kChannels floats for each pixel: of each map, those whose windows have one row.
struct WindowRows {
  const Pyramid& pyramid;
  const int maps;
  Windows windows[kMaps];
  float* rows[kMaps];
  float* line;  // a row of any map, for a moment
  float* free;  // behind them

  WindowRows(const Pyramid& pyramid, float* scratch)
      : pyramid(pyramid), maps(pyramid.pools + 1), line(scratch), free(scratch + pyramid.width * kChannels) {
    for (int map = 0; map < maps; ++map) {
      windows[map] = windows_of(pyramid, map);
      rows[map] = free;
      free += windows[map].floats();
    }
  }

  float* row(int map, int64_t window) const {
    return rows[map] + window % windows[map].overlap() * windows[map].width * kChannels;
  }

  static int64_t floats(const Pyramid& pyramid) {
    int64_t count = pyramid.width * kChannels;
    for (int map = 0; map <= pyramid.pools; ++map) count += windows_of(pyramid, map).floats();
    return count;
  }

  template <typename Done>
  void add(int64_t y, const float* pixels, const Done& done) const;
};

// Add row y [width, kChannels] of the image, from the first to the last; done(map, window) where a row is complete.
template <typename Done>
void WindowRows::add(int64_t y, const float* pixels, const Done& done) const {
  constexpr int kVectors = kChannels / kLanes;
  for (int map = 0; map < maps; ++map) {
    const Windows& of = windows[map];
    const int64_t first = of.begin_over(y), last = of.end_over(y);
    if (first >= last) continue;
    for (int64_t x = 0; x < of.width; ++x) {
      Float sum[kVectors] = {};
      const int64_t end = of.end(x, pyramid.width);
      for (int64_t column = of.begin(x); column < end; ++column)
        for (int v = 0; v < kVectors; ++v) sum[v] += load<Float>(pixels + column * kChannels + v * kLanes);
      for (int v = 0; v < kVectors; ++v) store(line + x * kChannels + v * kLanes, sum[v], kLanes);
    }
    const int64_t count = of.width * kChannels;
    for (int64_t window = first; window < last; ++window) {
      float* const to = row(map, window);
      if (of.begin(window) == y) {
        std::memcpy(to, line, sizeof(float) * count);
      } else {
        add_floats(line, count, to);
      }
    }
    for (int64_t window = first; window < last; ++window)
      if (of.end(window, pyramid.height) == y + 1) done(map, window);
  }
}

}  // namespace bcmfnet::BCM_LEVEL
