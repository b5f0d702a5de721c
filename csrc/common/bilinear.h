// Bilinear sampling with a scale of at least 1. Positions are exact fractions of integers. With `align_corners` the
// first and the last pixel of both sizes lie on each other; without, their outer edges do.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace bcmfnet {

// The two source positions of an output position, and the weight of the upper one: a + weight * (b - a).
struct Source {
  int64_t low, high;
  float weight;
};

// Where output positions lie in the source: (first + step * output) / divisor.
struct Positions {
  int64_t first, step, divisor;
};

BCM_HD Positions positions_of(int64_t in_size, int64_t out_size, bool align_corners) {
  if (!align_corners) return {in_size - out_size, 2 * in_size, 2 * out_size};
  return {0, in_size - 1, out_size > 1 ? out_size - 1 : 1};
}

// The upper of the two source positions. An axis that keeps its size is copied: no neighbour is read, which may be NaN.
BCM_HD int64_t high_of(int64_t low, int64_t in_size, int64_t out_size) {
  return low + 1 < in_size && in_size < out_size ? low + 1 : low;
}

// The weight of the upper source position, where the lower one is known.
BCM_HD float lerp_weight(int64_t output, int64_t low, int64_t in_size, int64_t out_size, bool align_corners = false) {
  const Positions positions = positions_of(in_size, out_size, align_corners);
  const int64_t numerator = positions.first + positions.step * output - positions.divisor * low;
  return numerator > 0 ? static_cast<float>(numerator) / static_cast<float>(positions.divisor) : 0.0f;
}

BCM_HD Source source_of(int64_t output, int64_t in_size, int64_t out_size, bool align_corners = false) {
  const Positions positions = positions_of(in_size, out_size, align_corners);
  const int64_t numerator = positions.first + positions.step * output;
  const int64_t low = numerator > 0 ? numerator / positions.divisor : 0;
  return {low, high_of(low, in_size, out_size), lerp_weight(output, low, in_size, out_size, align_corners)};
}

// The first output position whose lower source is `low` (0 to in_size, where it is out_size).
BCM_HD int64_t first_output(int64_t low, int64_t in_size, int64_t out_size, bool align_corners = false) {
  if (low <= 0) return 0;
  if (low >= in_size) return out_size;
  const Positions positions = positions_of(in_size, out_size, align_corners);
  return (positions.divisor * low - positions.first + positions.step - 1) / positions.step;
}

}  // namespace bcmfnet
