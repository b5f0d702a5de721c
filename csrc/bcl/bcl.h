// One call of the Boundary Corrected Loss, as the binding hands it to a kernel.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/select.h"

namespace bcmfnet {

// Classes whose labels the packed formats of the kernels hold: 13 bits of label + 1. bcmfnet/ops/_limits.py has the check.
constexpr int64_t kMaxClasses = 4096;

// A term whose coefficient is 0 is absent: not multiplied, so that it may be infinite.
struct BclOptions {
  float score[3], terms[3];  // weights of the cross-entropy of the own, the row-flipped and the column-flipped label
  float ce_weight, boundary_weight;
  int64_t ignore_index;
  int64_t step[2], offset[2];  // of the flip windows: rows, columns
  int64_t nms;                 // side of the suppression window
  Selection selection;         // on the grid of scores
  bool mirror, by_valid, per_image;
};

struct Bcl {
  const void* logits;  // [batch, classes, in_height, in_width] of any strides, counted in elements
  const void* target;  // [batch, out_height, out_width] of any strides
  const float* weight; // [classes], or null
  DType logits_type;
  DType target_type;
  int64_t batch, classes, in_height, in_width, out_height, out_width;
  int64_t logits_stride[4], target_stride[3];
  BclOptions options;
};

}  // namespace bcmfnet
