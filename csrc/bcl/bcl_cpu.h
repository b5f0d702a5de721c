// The stages of the loss on a CPU, compiled once for each level of instruction sets. Each works on a range of rows, and
// writes only what belongs to them, so that any number of threads gives the same bits.
#pragma once

#include <cstdint>

#include "bcl/bcl.h"
#include "common/levels.h"

namespace bcmfnet {

constexpr int kMaxLanes = 16;
constexpr int64_t kChunk = 64;  // pixels of a row at full resolution whose logits are held at a time

// Maps [batch, out_height, out_width].
struct BclMaps {
  int16_t* labels;  // -1: not valid
  uint16_t* score;  // on the grid
  float* term;      // of the boundary term, weighted; null with upsampling
  float* lse;       // log sum exp(z - max z); null where there is no gradient at full resolution
  uint8_t* mask;    // candidates, then the selected
};

// The columns of a row in the order in which vectors take them. At full resolution it is their own order. With
// upsampling a vector holds the k-th column of neighbouring cells: the k-th phase. A cell is what lies between two
// source columns.
struct BclColumns {
  int64_t pitch, phases;    // positions of a phase, a multiple of kMaxLanes; phases
  const int32_t* column;    // [phases, pitch]: the column of a position, out_width where there is none
  const float* share;       // [phases, pitch]: of the right source column
  const int32_t* position;  // [out_width]
  const int32_t* cell;      // [out_width]: position modulo pitch
  const int32_t* flipped;   // [out_width]: the column that the flip reads

  int64_t positions() const { return pitch * phases; }
};

// Partial figures of one row, or of one row of cells.
struct BclRow {
  double weight, ce, boundary;
  int64_t valid, selected;
  bool wrong_label, nan;
};

inline bool upsamples(const Bcl& call) {
  return call.in_height != call.out_height || call.in_width != call.out_width;
}

// A unit of work of the scores and the gradient: a row, or with upsampling a row of cells.
inline int64_t units(const Bcl& call) { return call.batch * call.in_height; }

// Output rows whose selected pixels are listed at a time: of a cell, 64 pixels or one row.
static inline int64_t listed_rows(const BclColumns& columns) { return columns.phases < 64 ? 64 / columns.phases : 1; }

// 32-bit words of scratch memory that one thread needs for the scores and the gradient.
inline int64_t scratch_words(const Bcl& call, const BclColumns& columns) {
  const int64_t line = 5 * columns.positions() + 2 * (call.out_width + kMaxLanes) + 2 * call.classes * kMaxLanes;
  const int64_t planes = 2 * call.classes * (call.in_width + 2 * kMaxLanes);
  const int64_t vectors = 4 * call.classes * kMaxLanes, corners = 4 * call.classes * columns.pitch;
  const int64_t selected = columns.pitch + 4 * listed_rows(columns) * columns.positions();
  return line + (upsamples(call) ? planes + vectors + corners + selected : call.classes * kChunk);
}

BCM_DECLARE(void bcl_labels(const Bcl& call, const BclMaps& maps, int64_t begin, int64_t end, BclRow* rows))

// Scores at full resolution.
BCM_DECLARE(void bcl_scores(
    const Bcl& call, const BclColumns& columns, const BclMaps& maps, int64_t begin, int64_t end, BclRow* units,
    void* scratch))

// Scores of upsampled logits, and where `gradient` is not null the gradient of their weighted sum of cross-entropies,
// [batch, classes, in_height, in_width]; what a row of cells adds to its lower source row goes to `lower` [batch,
// in_height, classes, in_width].
BCM_DECLARE(void bcl_low_scores(
    const Bcl& call, const BclColumns& columns, const BclMaps& maps, float* gradient, float* lower, int64_t begin,
    int64_t end, BclRow* units, void* scratch))

BCM_DECLARE(void bcl_candidates(
    const Bcl& call, const BclMaps& maps, int64_t begin, int64_t end, uint32_t* histogram, void* scratch))
BCM_DECLARE(void bcl_select(
    const Bcl& call, const BclMaps& maps, const int32_t* thresholds, int64_t begin, int64_t end, BclRow* rows))

// Gradient of a call at full resolution, times `grad`, of the logits' type and of any strides.
BCM_DECLARE(void bcl_gradient(
    const Bcl& call, const BclColumns& columns, const BclMaps& maps, const float* scales, float grad, void* gradient,
    const int64_t* stride, int64_t begin, int64_t end, void* scratch))

// Boundary terms of the selected pixels of upsampled logits, and `factor` times their gradient, which is added.
BCM_DECLARE(void bcl_low_selected(
    const Bcl& call, const BclColumns& columns, const BclMaps& maps, float factor, float* gradient, float* lower,
    int64_t begin, int64_t end, BclRow* units, void* scratch))

// Make `gradient` what it is to be: `factor` times the sum of both.
BCM_DECLARE(void bcl_add_lower(
    const Bcl& call, float factor, const float* lower, float* gradient, int64_t begin, int64_t end))

}  // namespace bcmfnet
