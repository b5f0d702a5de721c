// Bilinear sampling with align_corners=False and a scale of at least 1. Positions are exact fractions of integers.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace bcmfnet {

// The two source positions of an output position, and the weight of the upper one: a + weight * (b - a).
struct Source {
  int64_t low, high;
  float weight;
};

// The upper of the two source positions. An axis that keeps its size is copied: no neighbour is read, which may be NaN.
BCM_HD int64_t high_of(int64_t low, int64_t in_size, int64_t out_size) {
  return low + 1 < in_size && in_size < out_size ? low + 1 : low;
}

// The weight of the upper source position, where the lower one is known.
BCM_HD float lerp_weight(int64_t output, int64_t low, int64_t in_size, int64_t out_size) {
  const int64_t numerator = (2 * output + 1) * in_size - out_size - 2 * out_size * low;
  return numerator > 0 ? static_cast<float>(numerator) / static_cast<float>(2 * out_size) : 0.0f;
}

BCM_HD Source source_of(int64_t output, int64_t in_size, int64_t out_size) {
  const int64_t numerator = (2 * output + 1) * in_size - out_size;
  const int64_t low = numerator > 0 ? numerator / (2 * out_size) : 0;
  return {low, high_of(low, in_size, out_size), lerp_weight(output, low, in_size, out_size)};
}

// The first output position whose lower source is `low` (0 to in_size, where it is out_size).
BCM_HD int64_t first_output(int64_t low, int64_t in_size, int64_t out_size) {
  if (low <= 0) return 0;
  if (low >= in_size) return out_size;
  return (2 * out_size * low + out_size - in_size + 2 * in_size - 1) / (2 * in_size);
}

}  // namespace bcmfnet
