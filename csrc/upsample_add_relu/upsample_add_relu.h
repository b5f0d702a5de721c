// One call of upsample_add_relu, as the binding hands it to a kernel.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace bcmfnet {

// A map [batch, channels, height, width]; strides count elements.
struct Map {
  int64_t height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};

// out = relu(high + low, brought to the size of high); `out` has the size of `high` and is dense, its channels or its
// columns innermost.
struct UpsampleAddReLU {
  DType dtype;
  int64_t batch, channels;
  Map low, high, out;
  const void *low_values, *high_values;
  void* out_values;
};

}  // namespace bcmfnet
