// One call of lmfm, as the binding hands it to a kernel. bcmfnet/reference/lmfm.py says what is computed.
#pragma once

#include <cstdint>

#include "pyramid_pool/pyramid_pool.h"

namespace bcmfnet {

constexpr int kMaxBranches = 8;

struct Lmfm {
  Pyramid pyramid;
  DType dtype;  // of x, the weights and the result
  const void* x;
  int64_t batch_stride, channel_stride, row_stride, column_stride;  // of x, in elements
  int32_t branches;  // the map itself where they are two more than the pools, each pool, and the global average
  int32_t kernel[kMaxBranches];    // side of a branch's fusing convolution, 1 or 3, or 0: it has none
  int32_t receives[kMaxBranches];  // branch whose result is added before that convolution, or -1
  int64_t breadth, outputs;        // channels of every branch, and of the result
  const float* norms;              // [2, norm_stride]: multipliers, then shifts; in the order of the weights below
  int64_t norm_stride;
  const void* scale;        // [branches, channels, breadth]
  const void* process;      // [taps, breadth, breadth]: of each branch that has a convolution, input channels first
  const void* compression;  // [branches * breadth, outputs]
  const void* shortcut;     // [channels, outputs], or null
  void* out;                // [batch, outputs, height, width]
  int64_t out_batch_stride, out_channel_stride, out_row_stride, out_column_stride;
};

}  // namespace bcmfnet
