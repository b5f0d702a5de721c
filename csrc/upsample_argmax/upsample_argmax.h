// One call of upsample_argmax, as the binding hands it to a kernel.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace bcmfnet {

struct UpsampleArgmax {
  const void* logits;  // [batch, classes, in_height, in_width] of any strides, counted in elements
  DType dtype;
  int32_t wide;  // labels are int16, not uint8
  int64_t batch, classes, in_height, in_width;
  int64_t batch_stride, class_stride, row_stride, column_stride;
  int64_t out_height, out_width;
  void* labels;          // [batch, out_height, out_width]
  uint16_t* confidence;  // float16 [batch, out_height, out_width], or null
};

}  // namespace bcmfnet
