// The arithmetic of one output row, on vectors of its positions (Columns). Where their logits come from is the template
// argument `Logits`. All is in an unnamed namespace, so that what a file uses once is inlined.
#pragma once

#include "bcl/bcl_math.h"
#include "bcl/rooms_cpu.h"
#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"

namespace bcmfnet::BCM_ISA {
namespace {

// The three labels of a pixel in two words, each as label + 1, or 0 where it does not count; and whether it is
// selected.
struct Labels {
  static constexpr int kBits = 13, kSelected = kBits;
  static constexpr int32_t kMask = (1 << kBits) - 1;
  static_assert(kMaxClasses <= kMask, "a label + 1 must fit its bits");
  Int own, others;

  // Of label + 1 both; without its own label a pixel does not count.
  static int32_t pack_others(int32_t own, int32_t rows, int32_t columns) {
    return own != 0 ? rows | columns << kBits : 0;
  }
  Int operator()(int which) const {
    return (which == 0 ? own & kMask : which == 1 ? others & kMask : others >> kBits) - 1;
  }
  Int selected() const { return own >> kSelected; }
};

inline float sum_of(Float value) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

// Four chains: one alone would wait for its own comparisons.
template <typename Logits>
Float largest(const Logits& logits, int64_t classes) {
  constexpr int kChains = 4;
  Float best[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) best[i] = logits(i < classes ? i : 0);
  int64_t c = kChains;
  for (; c + kChains <= classes; c += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) best[i] = larger(best[i], logits(c + i));
  }
  for (; c < classes; ++c) best[0] = larger(best[0], logits(c));
  return larger(larger(best[0], best[1]), larger(best[2], best[3]));
}

// Class weights of labels that count, 0 of others.
inline Float class_weights(const Bcl& call, Int label) {
  const Int counts = label >= 0;
  const Float one = call.class_weight ? gather(call.class_weight, counts ? label : fill(0)) : fill(1.0f);
  return counts ? one : fill(0.0f);
}

// What the gradient takes from each label of kLanes pixels; `ce` and `boundary` are the factors of the two terms.
inline Amounts<Float> amounts_of(const Bcl& call, const Labels& label, float ce, float boundary) {
  const Float weight = class_weights(call, label(0));
  const Float of_boundary = label.selected() != 0 ? weight * boundary : fill(0.0f);
  return bcmfnet::amounts_of(call.options.terms, weight * ce, of_boundary, label(1) >= 0, label(2) >= 0);
}

// kLanes pixels in hand.
struct Pixels {
  const Bcl& call;
  const int64_t classes;
  const Int lane = lane_numbers();
  float *below, *exps;  // [classes, kLanes]: z - max z, and its exponential where it is kept
  Float sum, log_sum;   // of the exponentials

  Pixels(const Bcl& call, Arena& arena)
      : call(call), classes(call.logits.channels), below(arena.take<float>(classes * kLanes)),
        exps(arena.take<float>(classes * kLanes)) {}

  template <bool kKeeps, typename Logits>
  void evaluate(const Logits& logits) {
    const Float best = largest(logits, classes);
    float *to_below = below, *to_exps = exps;
    Float total = fill(0.0f);
    for (int64_t c = 0; c < classes; ++c) {
      const Float difference = logits(c) - best, e = exp(difference);
      store(to_below + c * kLanes, difference, kLanes);
      if (kKeeps) store(to_exps + c * kLanes, e, kLanes);
      total += e;
    }
    sum = total, log_sum = log(total);
  }

  // 0 where the label does not count.
  Float cross_entropy(Int label) const {
    const Int counts = label >= 0;
    const Float value = log_sum - gather(below, (counts ? label : fill(0)) * kLanes + lane);
    return counts ? value : fill(0.0f);
  }

  // Sum of the cross-entropies that have a coefficient, of which the first is known.
  Float sum_of(const float* coefficients, const Labels& label, Float own) const {
    const Float rows = coefficients[1] != 0 ? cross_entropy(label(1)) : own;
    return weighted(coefficients, own, rows, coefficients[2] != 0 ? cross_entropy(label(2)) : own);
  }
};

// What is left of total * softmax, class by class, when the labels have taken theirs. Where nothing is taken it is 0,
// whatever the logits are.
struct Taking {
  const Int counts, own, rows, columns;
  const Amounts<Float> amounts;
  const bool flips;

  Taking(const Bcl& call, const Labels& label, const Amounts<Float>& amounts)
      : counts(amounts.total != 0.0f), own(label(0)), rows(label(1)), columns(label(2)), amounts(amounts),
        flips(call.options.terms[1] != 0 || call.options.terms[2] != 0) {}

  Float operator()(int64_t c, Float p) const {
    const int32_t label = static_cast<int32_t>(c);
    Float g = counts ? p : fill(0.0f);
    g = own == label ? g - amounts.own : g;
    if (!flips) return g;
    g = rows == label ? g - amounts.rows : g;
    return columns == label ? g - amounts.columns : g;
  }
};

// One output row, by position.
struct Line {
  const Bcl& call;
  const Columns& columns;
  const Maps& maps;
  int64_t row = 0;       // of batch * H
  int32_t *own, *others;  // Labels
  int32_t* score;         // on the grid
  float *term, *lse;      // as in Maps
  int32_t *own_by_column, *others_by_column;  // Labels by column, and a 0 behind them
  Pixels pixels;          // at the positions in hand

  Line(const Run& run, Arena& arena)
      : call(run.call), columns(run.columns), maps(run.maps), pixels(call, arena) {
    for (int32_t** piece : {&own, &others, &score}) *piece = arena.take<int32_t>(columns.positions());
    for (float** piece : {&term, &lse}) *piece = arena.take<float>(columns.positions());
    for (int32_t** piece : {&own_by_column, &others_by_column})
      *piece = arena.take<int32_t>(call.target.width + kLanes);
  }

  void read_labels(int64_t image, int64_t y, bool selected);
  Labels labels(int64_t position) const { return {load<Int>(own + position), load<Int>(others + position)}; }
  template <bool kKeeps, typename Logits>
  void evaluate(const Logits& logits, int64_t position, RowStats& stats, Float& ce_sum);
  void write_maps() const;
};

inline void Line::read_labels(int64_t image, int64_t y, bool selected) {
  const BclOptions& options = call.options;
  const int64_t width = call.target.width, height = call.target.height, first = image * height;
  row = first + y;
  const int16_t* labels = maps.labels + row * width;
  const int64_t other = flipped(y, height, options.step[0], options.offset[0], options.mirror);
  const int16_t* other_labels = maps.labels + (first + other) * width;
  for (int64_t x = 0; x < width; ++x) own_by_column[x] = labels[x] + 1;
  for (int64_t x = 0; x < width; ++x)
    others_by_column[x] =
        Labels::pack_others(own_by_column[x], other_labels[x] + 1, own_by_column[columns.flipped[x]]);
  if (selected)
    for (int64_t x = 0; x < width; ++x) own_by_column[x] |= maps.mask[row * width + x] << Labels::kSelected;
  own_by_column[width] = others_by_column[width] = 0;
  for (int64_t p = 0; p < columns.positions(); p += kLanes) {
    const Int column = load<Int>(columns.column + p);
    store(own + p, gather(own_by_column, column), kLanes);
    store(others + p, gather(others_by_column, column), kLanes);
  }
}

template <bool kKeeps, typename Logits>
void Line::evaluate(const Logits& logits, int64_t position, RowStats& stats, Float& ce_sum) {
  const BclOptions& options = call.options;
  pixels.evaluate<kKeeps>(logits);
  const Labels label = labels(position);
  const Float ce = pixels.cross_entropy(label(0)), weight = class_weights(call, label(0));
  const Int counts = weight != 0.0f;
  ce_sum += counts ? weight * ce : fill(0.0f);
  if (maps.lse) store(lse + position, pixels.log_sum, kLanes);
  if (!selects(call)) return;
  const Float s = pixels.sum_of(options.score, label, ce);
  stats.nan |= any(s != s);
  store(score + position, __builtin_convertvector(on_grid(s), Int), kLanes);
  if (!maps.term) return;
  store(term + position, counts ? weight * pixels.sum_of(options.terms, label, ce) : fill(0.0f), kLanes);
}

inline void Line::write_maps() const {
  const int64_t width = call.target.width, at = row * width;
  for (int64_t x = 0; maps.lse && x < width; ++x) maps.lse[at + x] = lse[columns.position[x]];
  if (!selects(call)) return;
  for (int64_t x = 0; maps.term && x < width; ++x) maps.term[at + x] = term[columns.position[x]];
  for (int64_t x = 0; x < width; ++x) maps.score[at + x] = static_cast<uint16_t>(score[columns.position[x]]);
}

}  // namespace
}  // namespace bcmfnet::BCM_ISA
