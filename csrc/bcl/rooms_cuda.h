// What the rooms of the loss on a GPU share: the memory of a forward, and the launches that each room has. A launch
// returns a cudaError_t: what the runtime says of it, or of a setting that it needs.
#pragma once

#include <type_traits>

#include "bcl/bcl.h"
#include "bcl/bcl_math.h"
#include "bcl/radix_select_cuda.h"
#include "common/cuda/element.h"
#include "common/cuda/grid.h"

namespace bcmfnet {

constexpr int kThreads = 256;  // of a block of pixels, one for each of its columns
constexpr int kRows = 8;       // of a block of pixels; of each warp of a tile
constexpr int kPacked = 8;     // columns that a lane of a tile has, whose scores are 16 bytes
constexpr int kTileRows = kThreads / 32 * kRows, kTileColumns = 32 * kPacked;
constexpr int kCells = 32;     // of a row of a block of cells, at most: one for each lane
constexpr int kNodes = kCells + 1;
constexpr int kCellRows = 4;   // of a block of cells, at most
constexpr int kMostClasses = 31;  // A thread holds at most so many in registers, and their labels fit 5 bits.

// What a block of pixels or cells adds up.
struct Partial {
  double weight, ce;
  int64_t valid;
  unsigned flags;
};
constexpr unsigned kNan = 1;    // a score is NaN
constexpr unsigned kWrong = 2;  // a label is neither a class nor ignore_index, or its class weight is not finite

// What a block adds up for terms beside cross-entropy and boundary term: weights of pixels that have a label and of those
// that distillation is over, and losses.
struct TermSums {
  double labelled, distilled, spread, focal, distillation;
};

// What the pixels' gradient waits for.
struct Factors {
  Divisors divisors;
  double means[kValues];  // of the terms; that of the boundary term is not known yet
  float scales[3];        // inverse divisors, as a gradient takes them
  int64_t selected;
  unsigned flags;
  int threshold[1];  // of each histogram
};

// The cells of a block: rows of so many next to each other, between so many nodes; and the blocks of an image on top of
// each other. The columns to the left of the first node, `leading` ones, may follow those of the last block in a row: cells
// then fill blocks of a power of two. Their node is the last block's last one, which has no other use.
struct CellTile {
  int rows, cells, nodes;
  unsigned strips;
  int leading;
};

// Gradients by blocks of cells: of the rows of nodes above its rows of cells, [units, segments, classes, nodes], and of
// the row of nodes below the last of them, [strips, segments, classes, nodes].
struct Parts {
  float *upper, *lower;
};

// Device memory of one forward. Maps have the target's shape.
struct Scratch {
  float* logits;         // low-resolution logits of more than kMostClasses as float32, contiguous, where they are not
  uint16_t* score;       // rows of score_pitch, 0 beyond the image; of up to kMostClasses, the labels before the score
  uint64_t* labels;      // rows of score_pitch; of more than kMostClasses
  uint8_t* codes;        // rows of score_pitch, each label + 1 or 0, in place of both where codes_labels
  int64_t* other_rows;   // with them: how far it is to the label that flips of a row read,
  int* other_columns;    // and of a column
  uint32_t* candidates;  // rows of `words`, a bit for each pixel; where no rank decides they are the selected ones
  float* term;           // the boundary term, weighted; at full resolution
  float *best, *lse;     // max z, log sum exp(z - max z); with upsampling from more than kMostClasses
  float* inner;          // of more than kMostClasses with upsampling: sum of p by the slopes of overlap
  float *student_lse, *teacher_best, *teacher_lse;  // the same, for distillation: of logits over the temperature
  Histogram* histogram;  // for the batch or for each image
  Partial *labelled, *scored;  // of the blocks of `labels` and of `score`
  TermSums *labelled_terms, *scored_terms;
  float* overlap;              // [blocks, 3, classes]: I, P and Y of the blocks of `score`
  float *sums, *slopes;        // [groups, 3, classes], [groups, 2, classes]
  double* boundary;            // sums of boundary terms, of the blocks of `select` or `cells`
  CellTile tile;
  Parts parts, chosen;         // the gradient; where scores decide, that of the boundary term alone, but for its factor
  Factors* factors;
  int64_t score_pitch, words, groups, labelled_blocks, scored_blocks, boundary_blocks;
};

// Whether a call has more than cross-entropy and boundary term of logits that are upsampled with align_corners=False:
// it goes a way of its own (terms_cuda.h), where the scores have no gradient and one pass then adds that of all terms.
BCM_HD bool has_terms(const Bcl& call) {
  const BclOptions& options = call.options;
  return options.smoothing != 0 || options.focal_weight != 0 || options.focal_boundary || has_overlap(options) ||
         distills(call) || options.binary || call.pixel_weight.data != nullptr ||
         (options.align_corners && is_upsampled(call));
}

BCM_HD bool is_wide(const Bcl& call) { return call.logits.channels > kMostClasses; }

// Whether a pixel is known as selected as soon as it is scored, since nothing suppresses it and no rank decides: with
// upsampling the gradient of the boundary term is then added up beside that of the cross-entropy. More classes do not fit
// a block's shared memory.
constexpr int kMostDecided = 19;
BCM_HD bool decides(const Bcl& call) {
  return selects(call) && is_upsampled(call) && !has_terms(call) && call.options.nms == 1 &&
         !by_rank(call.options.selection) && call.logits.channels <= kMostDecided;
}

// Without other terms a block has some 128 columns of pixels, and some rows of cells, so that it adds up what two of them
// give to the nodes between them. Where the height stays, rows of cells have no nodes between them.
inline CellTile cell_tile_of(const Bcl& call) {
  const int64_t height = call.logits.height, in = call.logits.width, out = call.target.width;
  const bool single = is_wide(call) || has_terms(call) || height == call.target.height;
  const int rows = single ? 1 : call.logits.channels <= 19 ? kCellRows : 2;
  const int cells = is_wide(call) || has_terms(call) || out <= 4 * in ? kCells : out <= 8 * in ? 16 : 8;
  const int leading = is_wide(call) || has_terms(call) ? 0 : static_cast<int>(ceil_div(out - in, 2 * in));
  return {rows, cells, cells + 1, static_cast<unsigned>(ceil_div(height, rows)), leading};
}

// Whether the kernels of the pixels look up the labels of flips themselves: those without other terms, of upsampled logits
// of up to kMostClasses.
BCM_HD bool codes_labels(const Bcl& call) { return is_upsampled(call) && !is_wide(call) && !has_terms(call); }

inline int64_t segments_of(const Bcl& call) { return ceil_div(call.logits.width, cell_tile_of(call).cells); }
inline int64_t strips_of(const Bcl& call) { return call.logits.batch * cell_tile_of(call).strips; }
inline int64_t units_of(const Bcl& call) { return call.logits.batch * call.logits.height; }

inline dim3 pixel_grid(const Bcl& call) {
  return dim3(static_cast<unsigned>(call.logits.batch * ceil_div(call.target.height, kRows)),
              blocks_for(call.target.width, kThreads));
}

// Tiles: each warp of a block has some rows, each lane kPacked columns of them.
inline dim3 tile_grid(const Bcl& call) {
  return dim3(static_cast<unsigned>(call.logits.batch * ceil_div(call.target.height, kTileRows)),
              blocks_for(call.target.width, kTileColumns));
}

// Blocks of cells; their third axis, that of the classes, is left out of count_of.
inline dim3 cell_grid(const Bcl& call) {
  return dim3(static_cast<unsigned>(strips_of(call)), static_cast<unsigned>(segments_of(call)),
              is_wide(call) ? blocks_for(call.logits.channels, kMostClasses) : 1);
}
inline int64_t count_of(dim3 grid) { return static_cast<int64_t>(grid.x) * grid.y; }

// Returns launch(K) of the number of classes that a thread shall hold: CamVid's, Cityscapes', or the most.
template <int kMost = kMostClasses, typename Launch>
int by_classes(int64_t classes, Launch launch) {
  if (classes <= 11) return launch(std::integral_constant<int, 11>());
  if (kMost == 19 || classes <= 19) return launch(std::integral_constant<int, 19>());
  return launch(std::integral_constant<int, kMost>());
}

// The grid of the scores of a call with terms.
inline dim3 scored_grid(const Bcl& call) {
  return is_upsampled(call) && !is_wide(call) ? cell_grid(call) : pixel_grid(call);
}

// The same for calls with terms, of which there are fewer kernels.
template <typename Launch>
int by_classes_of_terms(const Bcl& call, Launch launch) {
  if (is_wide(call)) return launch(std::integral_constant<int, kMostClasses>(), std::true_type());
  if (classes_of(call) <= 19) return launch(std::integral_constant<int, 19>(), std::false_type());
  return launch(std::integral_constant<int, kMostClasses>(), std::false_type());
}

int launch_labels(const Bcl& call, const Scratch& scratch, void* stream);

// full: logits of the target's size.
int launch_full_scores(const Bcl& call, const Scratch& scratch, void* stream);

// upsampled: cells of low-resolution logits. More than kMostClasses are float32; `widen` makes them so.
int widen(const Bcl& call, const Scratch& scratch, void* stream);
int launch_upsampled_scores(const Bcl& call, const Scratch& scratch, bool gradient, void* stream);
int launch_selected(const Bcl& call, const Scratch& scratch, bool gradient, void* stream);
int gather_gradient(const Bcl& call, const Scratch& scratch, float* gradient, void* stream);

// terms: of pixels, of cells, of classes. The gradient of cells is written as launch_selected does.
int launch_term_scores(const Bcl& call, const Scratch& scratch, void* stream);
int launch_cell_scores(const Bcl& call, const Scratch& scratch, void* stream);
int launch_cell_gradient(const Bcl& call, const Scratch& scratch, void* stream);
int launch_overlap(const Bcl& call, const Scratch& scratch, const BclOutputs& outputs, void* stream);
int launch_term_gradient(const Bcl& call, const BclSaved& saved, const View& gradient, void* stream);
int launch_inner(const Bcl& call, const Scratch& scratch, void* stream);

// selection.
int launch_candidates(const Bcl& call, const Scratch& scratch, void* stream);
int launch_selection(const Bcl& call, const Scratch& scratch, uint8_t* mask, void* stream);

}  // namespace bcmfnet
