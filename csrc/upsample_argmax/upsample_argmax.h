// One call of upsample_argmax, as the binding hands it to a kernel.
#pragma once

#include "common/view.h"

namespace bcmfnet {

struct UpsampleArgmax {
  View logits;  // [batch, classes, h, w]
  int64_t out_height, out_width;
  void* labels;          // [batch, out_height, out_width] of uint8, or of int16 if `wide`
  uint16_t* confidence;  // float16 [batch, out_height, out_width], or null
  int32_t wide;
};

}  // namespace bcmfnet
