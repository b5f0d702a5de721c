// One call of upsample_add_relu, as the binding hands it to a kernel.
#pragma once

#include "common/view.h"

namespace bcmfnet {

// out = relu(high + low, brought to the size of high); `out` has the size of `high` and is dense, its channels or its
// columns innermost.
struct UpsampleAddReLU {
  View low, high, out;
};

// Whether the channels of the result are innermost.
BCM_HD bool is_channels_last(const UpsampleAddReLU& call) { return call.out.channel_stride == 1; }

}  // namespace bcmfnet
