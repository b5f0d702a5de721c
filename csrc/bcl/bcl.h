// One call of the Boundary Corrected Loss, as the binding hands it to a kernel.
#pragma once

#include <cstdint>

#include "bcl/selection.h"
#include "common/view.h"

namespace bcmfnet {

// Classes whose labels the packed formats of the kernels hold: 13 bits of label + 1. bcmfnet/ops/_limits.py has the
// check.
constexpr int64_t kMaxClasses = 4096;

// A term whose coefficient is 0 is absent: not multiplied, so that it may be infinite.
struct BclOptions {
  float score[3], terms[3];  // coefficients of the cross-entropy of the own, the row-flipped, the column-flipped label
  float ce_weight, boundary_weight;
  int64_t ignore_index;
  int64_t step[2], offset[2];  // of the flip windows: rows, columns
  int64_t nms;                 // side of the suppression window
  Selection selection;         // on the grid of scores
  bool mirror, by_valid, per_image;
};

struct Bcl {
  View logits;                // [batch, classes, h, w]
  View target;                // [batch, 1, H, W] of integers
  const float* class_weight;  // [classes], or null
  BclOptions options;
};

BCM_HD bool is_upsampled(const Bcl& call) {
  return call.logits.height != call.target.height || call.logits.width != call.target.width;
}

BCM_HD bool selects(const Bcl& call) { return call.options.boundary_weight != 0; }

// What a forward writes; what is not asked for is null. See `_figures_and_saved` in bcmfnet/ops/_bcl.py.
struct BclOutputs {
  float *loss, *ce, *boundary;
  int64_t *selected, *valid;
  int32_t* threshold;
  float* lse;
  uint8_t* mask;
  float *scales, *gradient;
};

}  // namespace bcmfnet
