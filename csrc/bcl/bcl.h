// One call of the loss, as the binding hands it to a kernel. bcmfnet/reference/bcl.py defines what it computes.
#pragma once

#include <cstdint>

#include "bcl/selection.h"
#include "common/view.h"

namespace bcmfnet {

// Classes whose labels the packed formats of the kernels hold: 13 bits of label + 1. bcmfnet/ops/_limits.py has the
// check.
constexpr int64_t kMaxClasses = 4096;

// Losses of overlap scores: dice, jaccard, tversky. See bcmfnet/reference/terms.py.
struct Overlap {
  enum Absent { kSkip, kZero, kCount };
  float weight[3];    // of each in the loss
  float alpha, beta;  // of tversky
  float smooth;
  Absent absent;
  bool log, per_image;
};

// A term whose coefficient is 0 is absent: not multiplied, so that it may be infinite.
struct BclOptions {
  float score[3], terms[3];  // coefficients of the cross-entropy of the own, the row-flipped, the column-flipped label
  float ce_weight, boundary_weight;
  int64_t ignore_index;
  int64_t step[2], offset[2];  // of the flip windows: rows, columns
  int64_t nms;                 // side of the suppression window
  Selection selection;         // on the grid of scores
  bool mirror, by_valid, per_image;
  bool focal_boundary;                        // the boundary term sums up the focal loss
  float smoothing, focal_weight, gamma;       // of labels; of the focal loss: its weight and its exponent
  Overlap overlap;
  float distillation_weight, temperature;
  bool everywhere;                            // distillation is over pixels without a label too
  bool binary;                                // one channel, a sigmoid: two classes, the first one's logit is 0
  float pos_weight;                           // class weight of the second one then
  bool align_corners;
};

struct Bcl {
  View logits;                // [batch, classes, h, w]
  View target;                // [batch, 1, H, W] of integers
  const float* class_weight;  // [classes], or null
  View pixel_weight;          // [batch, 1, H, W] of float32, or without data: 1
  View teacher;               // [batch, channels, any h, any w], or without data
  const float* shared_slopes; // [groups, 2, classes], in place of those that the overlap sums give, or null
  BclOptions options;
};

BCM_HD int64_t classes_of(const Bcl& call) { return call.options.binary ? 2 : call.logits.channels; }

BCM_HD bool has_overlap(const BclOptions& options) {
  return options.overlap.weight[0] != 0 || options.overlap.weight[1] != 0 || options.overlap.weight[2] != 0;
}

BCM_HD bool distills(const Bcl& call) {
  return call.teacher.data != nullptr && call.options.distillation_weight != 0;
}

BCM_HD int64_t overlap_groups(const Bcl& call) { return call.options.overlap.per_image ? call.logits.batch : 1; }

BCM_HD bool is_upsampled(const Bcl& call) {
  return call.logits.height != call.target.height || call.logits.width != call.target.width;
}

BCM_HD bool selects(const Bcl& call) { return call.options.boundary_weight != 0; }

// Means of the terms, in the order of BclOutputs::values.
enum Value { kCe, kBoundary, kFocal, kDice, kJaccard, kTversky, kDistillation, kValues };

// What a forward writes; what is not asked for is null. See `_outputs_and_saved` in bcmfnet/ops/_bcl.py.
struct BclOutputs {
  float *loss, *values;  // [], [kValues]
  int64_t* counts;       // selected, valid
  int32_t* threshold;
  float* sums;           // [groups, 3, classes]: I, P and Y of overlap
  float* lse;
  uint8_t* mask;
  float *scales, *slopes, *gradient;  // [3]: of ce, boundary, distillation; [groups, 2, classes]: by P and I
};

// What a backward at full resolution reads, and how the gradient is scaled.
struct BclSaved {
  const float* grad;
  const float* lse;
  const uint8_t* mask;
  const float *scales, *slopes;
};

}  // namespace bcmfnet
