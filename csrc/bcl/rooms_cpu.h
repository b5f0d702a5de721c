// What the rooms of the loss on a CPU share: the memory of a call, and the stages that each room has. A stage divides
// rows among threads and writes only what belongs to them.
#pragma once

#include <initializer_list>

#include "bcl/bcl_math.h"
#include "common/integers.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace bcmfnet::BCM_ISA {

constexpr int kScores = 65536;

// Whether a pixel's arithmetic is more than cross-entropy, class weights and the boundary term.
static inline bool has_terms(const Bcl& call) {
  const BclOptions& options = call.options;
  return call.pixel_weight.data || distills(call) || has_overlap(options) || options.smoothing != 0 ||
         options.focal_weight != 0 || options.focal_boundary;
}

// Whether a pixel whose score reaches tau is known as selected as soon as it is scored: nothing suppresses it or ranks
// it out, and the boundary term trains its own label: its gradient is that of the cross-entropy times a number.
static inline bool decides(const Bcl& call) {
  const BclOptions& options = call.options;
  return selects(call) && is_upsampled(call) && !has_terms(call) && options.nms == 1 &&
         options.selection.max_kept < 0 && options.terms[1] == 0 && options.terms[2] == 0;
}

// Maps [batch, H, W].
struct Maps {
  int16_t* labels;  // -1: not valid
  uint16_t* score;  // on the grid; null where it is not read again
  float* term;      // the boundary term, weighted; null with upsampling
  float* lse;       // log sum exp(z - max z); null where there is no gradient at full resolution
  uint8_t* mask;    // candidates, then the selected
};

// The columns of a row in the order in which vectors take them. At full resolution it is their own order. With
// upsampling a vector holds the k-th column of neighbouring cells: the k-th phase. A cell is what lies between two
// source columns.
struct Columns {
  int64_t pitch, phases;  // positions of a phase, a multiple of kLanes; phases
  int32_t* column;        // [phases, pitch]: the column of a position, W where there is none
  float* weight;          // [phases, pitch]: of the right source column
  int32_t* position;      // [W]
  int32_t* cell;          // [W]: position modulo pitch
  int32_t* flipped;       // [W]: the column that the flip reads

  int64_t positions() const { return pitch * phases; }
};

// Sums of one row, or of one row of cells.
struct RowStats {
  double weight, plain, all;  // of labels with their weights; of the weights of valid pixels, and of all
  double ce, boundary, focal, spread, distillation;
  int64_t valid, selected, candidates;
  bool wrong_label, nan;
};

// Weights of the classes that smoothing spreads over [classes], and their sum. A class of weight 0 is left out.
struct SpreadWeights {
  float *of_class, sum;
};

// A call with its memory. A unit of work of scores and gradients is a row of logits: a row of pixels, or with
// upsampling a row of cells.
struct Run {
  const Bcl& call;
  Parallel parallel;
  int64_t rows, units;
  Columns columns;
  Maps maps;
  RowStats *by_row, *by_unit;  // [rows], [units]
  int32_t* thresholds;         // one, or one for each image
  uint32_t* histogram;         // [thresholds, kScores]; null where no rank decides
  float* lower;                // [units, channels, w]: what a row of cells adds to the source row below it
  float *chosen, *chosen_lower;  // the same two of the pixels that are known as selected (decides), else null
  SpreadWeights spread;
  double* overlap_sums;        // [units, 3, classes]: I, P and Y
  float* own_slopes;           // where they are not saved
  const float* slopes;         // [groups, 2, classes]: derivatives of the overlap terms by P and I
  TermFactors factors;

  // Of the overlap terms, for an image; null where there are none.
  const float* slopes_of(int64_t image) const {
    if (!has_overlap(call.options)) return nullptr;
    return slopes + (call.options.overlap.per_image ? image : 0) * 2 * classes_of(call);
  }
  int64_t thresholds_count() const { return call.options.per_image ? call.logits.batch : 1; }

  // body(begin, end, scratch) of units, or of rows.
  template <typename Body>
  void parallel_units(int64_t bytes, const Body& body) const {
    const int64_t work = call.logits.channels * call.target.width * call.target.height / call.logits.height;
    parallel_tasks(parallel, units, work, bytes, body);
  }
  template <typename Body>
  void parallel_rows(int64_t bytes, const Body& body) const {
    parallel_tasks(parallel, rows, call.target.width, bytes, body);
  }
};

// full: logits of the target's size.
void score_full(const Run& run);
void write_gradient(const Run& run, float grad, const View& gradient);

// upsampled: the gradient is [batch, channels, h, w], or null. What `score` finds of it is completed by the selected
// pixels alone, as far as it could not know them (decides); where overlap is a term, which takes sums over all pixels
// first, `differentiate` finds all of it. `add_lower` multiplies with `factor`, and what is of chosen pixels with both.
void score_upsampled(const Run& run, float* gradient);
void add_selected(const Run& run, float factor, float* gradient);
void differentiate_upsampled(const Run& run, float* gradient);
void add_lower(const Run& run, float factor, float of_chosen, float* gradient);

// overlap: from the sums of units the values of the terms [3], the sums to [groups, 3, classes] and the slopes.
void evaluate_overlap(const Run& run, double* values, float* sums, float* slopes);

// selection. The pixels from tau on, where their number is known, are enough unless ranks let in easier ones.
bool chosen_are_enough(const Run& run);
void find_candidates(const Run& run);
void select(const Run& run);

// Calls each(x) where a byte of a row is not 0; most are.
template <typename Each>
static void each_marked(const uint8_t* marks, int64_t width, Each each) {
  constexpr int64_t kStep = 8;
  for (int64_t x = 0; x < width; x += kStep) {
    uint64_t some = 1;
    if (x + kStep <= width) std::memcpy(&some, marks + x, kStep);
    if (some == 0) continue;
    for (int64_t i = x; i < x + kStep && i < width; ++i)
      if (marks[i]) each(i);
  }
}

}  // namespace bcmfnet::BCM_ISA
