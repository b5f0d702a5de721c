// The softmax of pixels, on vectors of the positions of a row (Columns), and their labels. Where logits come from is the
// template argument `Logits`. All is in an unnamed namespace, so that what a file uses once is inlined.
#pragma once

#include "bcl/bcl_math.h"
#include "bcl/rooms_cpu.h"
#include "common/arena.h"
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
__attribute__((always_inline)) inline Float largest(const Logits& logits, int64_t classes) {
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

// kLanes pixels in hand.
struct Pixels {
  const Bcl& call;
  const int64_t classes;
  const Int lane = lane_numbers();
  float *below, *exps;  // [classes, kLanes]: z - max z, and its exponential where it is kept
  Float best;           // max z
  Float sum, log_sum;   // of the exponentials

  Pixels(const Bcl& call, Arena& arena)
      : call(call), classes(classes_of(call)), below(arena.take<float>(classes * kLanes)),
        exps(arena.take<float>(classes * kLanes)) {}

  template <bool kKeeps, typename Logits>
  __attribute__((always_inline)) void evaluate(const Logits& logits) {
    if (call.options.binary) return evaluate_binary(logits(1));
    const Float highest = largest(logits, classes);
    float *to_below = below, *to_exps = exps;
    Float total = fill(0.0f);
    for (int64_t c = 0; c < classes; ++c) {
      const Float difference = logits(c) - highest, e = exp(difference);
      store(to_below + c * kLanes, difference, kLanes);
      if (kKeeps) store(to_exps + c * kLanes, e, kLanes);
      total += e;
    }
    best = highest, sum = total, log_sum = log(total);
  }

  // Of the logits 0 and z: one of the two exponentials is 1.
  __attribute__((always_inline)) void evaluate_binary(Float z) {
    best = larger(z, fill(0.0f));
    const Float first = -best, second = z - best, e = exp(first + second);
    store(below, first, kLanes), store(below + kLanes, second, kLanes);
    store(exps, z > 0.0f ? e : fill(1.0f), kLanes), store(exps + kLanes, z > 0.0f ? fill(1.0f) : e, kLanes);
    sum = 1.0f + e, log_sum = log1p(e);
  }

  // Those of the labels, or of class 0, from `below` or `exps`.
  Float of_label(const float* planes, Int label) const {
    if (call.options.binary) return label > 0 ? load<Float>(planes + kLanes) : load<Float>(planes);
    return gather(planes, (label >= 0 ? label : fill(0)) * kLanes + lane);
  }

  // 0 where the label does not count.
  Float cross_entropy(Int label) const {
    const Float value = log_sum - of_label(below, label);
    return label >= 0 ? value : fill(0.0f);
  }

  // 0 where the label does not count.
  Float probability(Int label) const {
    const Float value = of_label(exps, label) / sum;
    return label >= 0 ? value : fill(0.0f);
  }

  // Sum of the cross-entropies that have a coefficient, of which the first is known.
  Float sum_of(const float* coefficients, const Labels& label, Float own) const {
    const Float rows = coefficients[1] != 0 ? cross_entropy(label(1)) : own;
    return weighted(coefficients, own, rows, coefficients[2] != 0 ? cross_entropy(label(2)) : own);
  }
};

}  // namespace
}  // namespace bcmfnet::BCM_ISA
