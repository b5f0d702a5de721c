// One call of stem_conv, as the binding hands it to a kernel.
#pragma once

#include "common/view.h"

namespace bcmfnet {

// out = relu(weight * x + bias): a convolution of 3x3 with stride 2, of x = scale * images + shift with zeros around.
struct StemConv {
  View images;       // [batch, 3, height, width], of uint8 or of floats
  View weight;       // [channels, 3, 3, 3]
  View out;          // [batch, channels, (height + 1) / 2, (width + 1) / 2], its channels innermost, as `weight`
  const void* bias;  // [channels], as `weight`
  float scale[3], shift[3];
};

constexpr int kTaps = 27;  // products of an element: of the nine pixels in order, three channels each

// Where the weight of a tap is.
BCM_HD int64_t tap_of(const View& weight, int64_t channel, int tap) {
  return offset_of(weight, channel, tap % 3, tap / 9, tap / 3 % 3);
}

}  // namespace bcmfnet
