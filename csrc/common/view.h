// The one description of a tensor that a binding hands to a kernel.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace bcmfnet {

// A map [batch, channels, height, width]; its strides count elements.
struct View {
  void* data;  // A kernel writes to its outputs alone: the binding casts the const of inputs away.
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
  DType dtype;
};

BCM_HD int64_t offset_of(const View& view, int64_t image, int64_t channel, int64_t row, int64_t column = 0) {
  return image * view.batch_stride + channel * view.channel_stride + row * view.row_stride +
         column * view.column_stride;
}

}  // namespace bcmfnet
