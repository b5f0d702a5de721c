// One call of pyramid_pool or of its gradient, as the binding hands it to a kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/view.h"

namespace bcmfnet {

constexpr int kMaxPools = 6;
constexpr int kMaxMaps = kMaxPools + 1;  // pooled maps, the global average among them

struct Pool {
  int64_t kernel, stride, padding;  // kernel = 2 * padding + 1; what a window covers beyond the map counts as zeros
  int64_t height, width;            // of the pooled map
};

// A map's size and what it is pooled to: `pools` maps of averages, and the global one.
struct Pyramid {
  int64_t batch, channels, height, width;
  int32_t pools;
  Pool pool[kMaxPools];
};

inline Pyramid make_pyramid(const View& map, const int64_t* triples, size_t count) {
  Pyramid pyramid{map.batch, map.channels, map.height, map.width, static_cast<int32_t>(count / 3), {}};
  for (int32_t i = 0; i < pyramid.pools; ++i) {
    const int64_t stride = triples[3 * i + 1];
    pyramid.pool[i] = {
        triples[3 * i], stride, triples[3 * i + 2], 1 + (map.height - 1) / stride, 1 + (map.width - 1) / stride};
  }
  return pyramid;
}

struct PyramidPool {
  Pyramid pyramid;
  View map;               // It is read, or for the gradient written.
  void* packed;           // The averages of each pool, then the global ones, each map dense: written, or read.
  int32_t channels_last;  // A packed map is [batch, height, width, channels], else [batch, channels, height, width].
};

}  // namespace bcmfnet
