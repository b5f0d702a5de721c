// One call of pyramid_pool or of its gradient, as the binding hands it to a kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace bcmfnet {

constexpr int kMaxPools = 6;

struct Pool {
  int64_t kernel, stride, padding;  // kernel = 2 * padding + 1; what it covers beyond the map counts as zeros
  int64_t height, width;            // of the pooled map
};

// A map and what it is pooled to: `pools` averages, and the global one.
struct Pyramid {
  int64_t batch, channels, height, width;
  int32_t pools;
  Pool pool[kMaxPools];
};

inline Pyramid make_pyramid(
    int64_t batch, int64_t channels, int64_t height, int64_t width, const int64_t* triples, size_t count) {
  Pyramid pyramid{batch, channels, height, width, static_cast<int32_t>(count / 3), {}};
  for (int32_t i = 0; i < pyramid.pools; ++i) {
    const int64_t stride = triples[3 * i + 1];
    pyramid.pool[i] = {triples[3 * i], stride, triples[3 * i + 2], 1 + (height - 1) / stride, 1 + (width - 1) / stride};
  }
  return pyramid;
}

struct PyramidPool {
  Pyramid pyramid;
  DType dtype;
  int32_t channels_last;  // layout of each packed map: [batch, height, width, channels], else [batch, channels, ...]
  void* map;              // [batch, channels, height, width]: read, or for the gradient written
  int64_t batch_stride, channel_stride, row_stride, column_stride;  // of `map`, in elements
  void* packed;  // maps of the averages, then the global one, each dense: written, or for the gradient read
};

}  // namespace bcmfnet
