// One call of lmfm, as the binding hands it to a kernel. bcmfnet/reference/lmfm.py says what is computed.
#pragma once

#include <cstdint>

#include "common/view.h"
#include "pyramid_pool/pyramid_pool.h"

namespace bcmfnet {

constexpr int kMaxBranches = 8;

// The fusing convolution of a branch.
struct Fusing {
  int32_t kernel;    // its side, 1 or 3, or 0: there is none
  int32_t receives;  // the branch whose result is added to its input, or -1
  int32_t level;     // It waits for the convolutions of lower levels alone; 1 is the lowest.
  int32_t number;    // convolutions of the branches before this one
  int32_t tap;       // taps of the convolutions before it
};

// Batch norms before convolutions, [number of the norm, channels].
struct Norms {
  const float *multipliers, *shifts;

  Norms from(int64_t element) const { return {multipliers + element, shifts + element}; }
};

// Weights have the dtype of x, input channels before outputs.
struct Lmfm {
  Pyramid pyramid;
  View x, out;
  int32_t branches;  // the map itself where they are two more than the pools, each pool, and the global average
  Fusing fusing[kMaxBranches];
  int64_t branch_channels;
  Norms scale_norms;        // [branches, channels]
  Norms shortcut_norms;     // [channels]
  Norms process_norms;      // [convolutions, branch_channels]
  Norms compression_norms;  // [branches, branch_channels]
  const void* scale;        // [branches, channels, branch_channels]
  const void* process;      // [taps of all convolutions, branch_channels, branch_channels]
  const void* compression;  // [branches * branch_channels, outputs]
  const void* shortcut;     // [channels, outputs], or null
};

}  // namespace bcmfnet
