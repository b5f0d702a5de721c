// Calls of upsample_add_relu and of its gradient, as the binding hands them to a kernel.
#pragma once

#include "common/bilinear.h"
#include "common/view.h"

namespace bcmfnet {

// out = relu(high + low, brought to the size of high); `out` has the size of `high` and is dense, its channels or its
// columns innermost.
struct UpsampleAddReLU {
  View low, high, out;
};

// Gradients of `high` and `low`, from that of `out` and from `out` itself: where it is not positive there is none. They
// are dense, and have the memory format of `out`.
struct UpsampleAddReLUBackward {
  View grad, out, high, low;
};

// Whether the channels of the result are innermost.
template <typename Call>
BCM_HD bool is_channels_last(const Call& call) {
  return call.out.channel_stride == 1;
}

// The output positions of an axis whose lower source position is the same: the first of them, the weight that the upper
// one has there, and by how much it grows from one to the next. Negative weights count as 0.
struct Cell {
  int64_t begin;
  float weight, step;
};

BCM_HD Cell cell_of(int64_t low, int64_t in_size, int64_t out_size) {
  const int64_t begin = first_output(low, in_size, out_size);
  if (low < 0 || high_of(low, in_size, out_size) == low) return {begin, 0, 0};
  const Positions positions = positions_of(in_size, out_size, false);
  const float divisor = static_cast<float>(positions.divisor);
  const int64_t numerator = positions.first + positions.step * begin - positions.divisor * low;
  return {begin, static_cast<float>(numerator) / divisor, static_cast<float>(positions.step) / divisor};
}

// Of the `number`-th position of a cell.
BCM_HD float upper_weight(const Cell& cell, int64_t number) {
  const float weight = cell.weight + cell.step * static_cast<float>(number);
  return weight > 0 ? weight : 0;
}

}  // namespace bcmfnet
