// One output row: its labels and weights by position, and what a forward makes of its pixels.
#pragma once

#include "bcl/terms_cpu.h"
#include "common/rows.h"

namespace bcmfnet::BCM_ISA {
namespace {

// Sums over kLanes pixels after the other, of terms with their weights.
struct TermSums {
  Float ce = fill(0.0f), boundary = ce, focal = ce, spread = ce, distillation = ce;
  Int selected = fill(0), candidates = selected;  // negative counts, of pixels that are decided upon

  template <bool kTerms, bool kDecides>
  void add_to(RowStats& stats) const {
    stats.ce += sum_of(ce);
    if (kTerms || kDecides) stats.boundary += sum_of(boundary);
    for (int i = 0; kDecides && i < kLanes; ++i) stats.selected -= selected[i], stats.candidates -= candidates[i];
    if (!kTerms) return;
    stats.focal += sum_of(focal);
    stats.spread += sum_of(spread), stats.distillation += sum_of(distillation);
  }
};

// One output row, by position.
struct Line {
  const Run& run;
  const Bcl& call;
  const Columns& columns;
  const Maps& maps;
  int64_t row = 0;       // of batch * H
  int32_t *own, *others;  // Labels
  int32_t* score;         // on the grid
  float *term, *lse;      // as in Maps
  int32_t *own_by_column, *others_by_column;  // Labels by column, and a 0 behind them
  const bool counts_everywhere, has_weights;
  float *weight, *weight_by_column;           // of pixels, where not all have 1
  const int32_t least;                        // the score from which a pixel is chosen, where it `kDecides`
  Int chosen = fill(0);                       // pixels in hand
  Pixels pixels;                              // at the positions in hand
  Focal focal;
  Distillation distillation;
  OverlapSums overlap;

  Line(const Run& run, Arena& arena)
      : run(run), call(run.call), columns(run.columns), maps(run.maps),
        counts_everywhere(distills(call) && call.options.everywhere),
        has_weights(call.pixel_weight.data || counts_everywhere),
        least(larger_of(call.options.selection.tau, int32_t{1})), pixels(call, arena), distillation(call, arena),
        overlap(call, arena) {
    for (int32_t** piece : {&own, &others, &score}) *piece = arena.take<int32_t>(columns.positions());
    for (float** piece : {&term, &lse}) *piece = arena.take<float>(columns.positions());
    for (int32_t** piece : {&own_by_column, &others_by_column})
      *piece = arena.take<int32_t>(call.target.width + kLanes);
    if (others && !selects(call)) std::memset(others, 0, columns.positions() * sizeof(int32_t));
    weight = arena.take<float>(has_weights ? columns.positions() : 0);
    weight_by_column = arena.take<float>(has_weights ? call.target.width + kLanes : 0);
  }

  void read_labels(int64_t image, int64_t y, bool selected);
  Labels labels(int64_t position) const { return {load<Int>(own + position), load<Int>(others + position)}; }
  Float weights(int64_t position) const { return has_weights ? load<Float>(weight + position) : fill(1.0f); }
  template <bool kTerms>
  bool any_counts(int64_t position) const {
    return any(load<Int>(own + position)) || (kTerms && counts_everywhere && any(load<Float>(weight + position) != 0.0f));
  }
  // Of pixels of a unit; `teacher` is read where there is distillation.
  template <bool kKeeps, bool kTerms, bool kDecides, typename Logits>
  void evaluate(
      const Logits& logits, const Logits& teacher, int64_t position, int64_t unit, RowStats& stats, TermSums& sums);
  // What the gradient of all terms takes, where the sums of a first pass are known, and the boundary term.
  template <typename Logits>
  void evaluate_again(const Logits& logits, const Logits& teacher, int64_t position, TermSums& sums);
  TermGradient gradient(int64_t position, int64_t image) const {
    return {run, pixels, focal, distillation, labels(position), weights(position), run.slopes_of(image)};
  }
  void write_maps() const;
  void begin_unit() {
    if (has_overlap(call.options)) overlap.clear();
  }
  void end_unit(int64_t unit) {
    if (has_overlap(call.options)) overlap.move(run.overlap_sums + unit * 3 * overlap.classes);
  }

 private:
  void read_others(int64_t image, int64_t y);
  void read_weights(int64_t image, int64_t y);
  template <typename Logits>
  void add_terms(
      const Logits& logits, const Logits& teacher, const Labels& label, int64_t position, int64_t unit, TermSums& sums);
};

// Weights of the pixels, whatever their labels are; 0 at positions without a column.
inline void Line::read_weights(int64_t image, int64_t y) {
  const View& from = call.pixel_weight;
  const int64_t width = call.target.width, at = from.data ? offset_of(from, image, 0, y) : 0;
  const float* data = static_cast<const float*>(from.data);
  for (int64_t x = 0; x < width; ++x) weight_by_column[x] = data ? data[at + x * from.column_stride] : 1.0f;
  weight_by_column[width] = 0;
  for (int64_t p = 0; p < columns.positions(); p += kLanes)
    store(weight + p, gather(weight_by_column, load<Int>(columns.column + p)), kLanes);
}

inline void Line::read_labels(int64_t image, int64_t y, bool selected) {
  const int64_t width = call.target.width;
  row = image * call.target.height + y;
  if (has_weights) read_weights(image, y);
  const int16_t* labels = maps.labels + row * width;
  for (int64_t x = 0; x < width; ++x) own_by_column[x] = labels[x] + 1;
  if (selects(call)) read_others(image, y);
  if (selected)
    for (int64_t x = 0; x < width; ++x) own_by_column[x] |= maps.mask[row * width + x] << Labels::kSelected;
  own_by_column[width] = 0;
  for (int64_t p = 0; p < columns.positions(); p += kLanes)
    store(own + p, gather(own_by_column, load<Int>(columns.column + p)), kLanes);
}

// The flipped labels; without a selection they stay 0.
inline void Line::read_others(int64_t image, int64_t y) {
  const BclOptions& options = call.options;
  const int64_t width = call.target.width, height = call.target.height;
  const int64_t other = flipped(y, height, options.step[0], options.offset[0], options.mirror);
  const int16_t* rows = maps.labels + (image * height + other) * width;
  for (int64_t x = 0; x < width; ++x)
    others_by_column[x] = Labels::pack_others(own_by_column[x], rows[x] + 1, own_by_column[columns.flipped[x]]);
  others_by_column[width] = 0;
  for (int64_t p = 0; p < columns.positions(); p += kLanes)
    store(others + p, gather(others_by_column, load<Int>(columns.column + p)), kLanes);
}

template <bool kKeeps, bool kTerms, bool kDecides, typename Logits>
void Line::evaluate(
    const Logits& logits, const Logits& teacher, int64_t position, int64_t unit, RowStats& stats, TermSums& sums) {
  const BclOptions& options = call.options;
  pixels.evaluate<kKeeps>(logits);
  const Labels label = labels(position);
  Float weight = class_weights(call, label(0));
  if (kTerms) weight *= weights(position);
  const Float ce = pixels.cross_entropy(label(0));
  const Int counts = weight != 0.0f;
  sums.ce += counts ? weight * ce : fill(0.0f);
  if (kTerms) add_terms(logits, teacher, label, position, unit, sums);
  if (maps.lse) store(lse + position, pixels.log_sum, kLanes);
  if (!selects(call)) return;
  const Float s = pixels.sum_of(options.score, label, ce);
  stats.nan |= any(s != s);
  const Int steps = __builtin_convertvector(on_grid(s), Int);
  store(score + position, steps, kLanes);
  if (kDecides) {
    chosen = steps >= least;
    sums.selected += chosen, sums.candidates += steps > 0;
    sums.boundary += (chosen & counts) != 0 ? weight * boundary_term<kTerms>(pixels, label, ce) : fill(0.0f);
  }
  if (!maps.term) return;
  store(term + position, counts ? weight * boundary_term<kTerms>(pixels, label, ce) : fill(0.0f), kLanes);
}

template <typename Logits>
void Line::add_terms(
    const Logits& logits, const Logits& teacher, const Labels& label, int64_t position, int64_t unit, TermSums& sums) {
  const BclOptions& options = call.options;
  const Float pixel_weight = weights(position), valid = label(0) >= 0 ? pixel_weight : fill(0.0f);
  const auto add = [](Float& sum, Float weight, Float value) { sum += weight != 0.0f ? weight * value : fill(0.0f); };
  if (options.focal_weight != 0) {
    focal = Focal(pixels, label(0));
    add(sums.focal, class_weights(call, label(0)) * pixel_weight, focal.loss);
  }
  if (options.smoothing != 0)
    add(sums.spread, valid,
        run.spread.sum * pixels.log_sum - logits.spread(run.spread, pixels.classes, pixels.best));
  if (has_overlap(options))
    overlap.add(pixels, label(0), valid, run.overlap_sums + unit * 3 * overlap.classes);
  if (!distills(call)) return;
  distillation.evaluate(teacher, pixels);
  add(sums.distillation, counts_everywhere ? pixel_weight : valid, distillation.value);
}

template <typename Logits>
void Line::evaluate_again(const Logits& logits, const Logits& teacher, int64_t position, TermSums& sums) {
  pixels.evaluate<true>(logits);
  if (distills(call)) distillation.evaluate(teacher, pixels);
  const Labels label = labels(position);
  if (call.options.focal_weight != 0) focal = Focal(pixels, label(0));
  if (!any(label.selected())) return;
  const Float weight = label.selected() != 0 ? class_weights(call, label(0)) * weights(position) : fill(0.0f);
  const Float term = boundary_term<true>(pixels, label, pixels.cross_entropy(label(0)));
  sums.boundary += weight != 0.0f ? weight * term : fill(0.0f);
}

inline void Line::write_maps() const {
  const int64_t width = call.target.width, at = row * width;
  for (int64_t x = 0; maps.lse && x < width; ++x) maps.lse[at + x] = lse[columns.position[x]];
  for (int64_t x = 0; maps.term && x < width; ++x) maps.term[at + x] = term[columns.position[x]];
  for (int64_t x = 0; maps.score && x < width; ++x)
    maps.score[at + x] = static_cast<uint16_t>(score[columns.position[x]]);
}

}  // namespace
}  // namespace bcmfnet::BCM_ISA
