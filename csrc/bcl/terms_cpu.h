// What the terms beside cross-entropy make of kLanes pixels, each in a struct or a function of its own, and the gradient
// of all terms together.
#pragma once

#include "bcl/pixels_cpu.h"

namespace bcmfnet::BCM_ISA {
namespace {

// The focal loss (1 - p)^gamma ce of a cross-entropy, and its derivative with respect to that.
struct Focal {
  Float loss, slope;

  Focal(float gamma, Float ce) : loss(ce), slope(fill(1.0f)) {
    if (gamma == 0) return;
    const Float p = exp(-ce);
    const Float series = 1.0f - ce / 2.0f * (1.0f - ce / 3.0f * (1.0f - ce / 4.0f * (1.0f - ce / 5.0f)));
    const Float miss = ce < 0.125f ? ce * series : 1.0f - p;
    const Float power = gamma == 2 ? miss : exp((gamma - 1) * log(miss));  // (1 - p)^(gamma - 1)
    const Int certain = miss <= 0.0f;
    loss = certain ? fill(0.0f) : power * miss * ce;
    slope = certain ? fill(0.0f) : power * (miss + gamma * p * (ce < 87.0f ? ce : fill(0.0f)));
  }
};

// The boundary term: the sum of the cross-entropies, or focal losses, that have a coefficient. The first ce is known.
inline Float boundary_term(const Pixels& pixels, const Labels& label, Float own) {
  const BclOptions& options = pixels.call.options;
  if (!options.focal_boundary) return pixels.sum_of(options.terms, label, own);
  const auto focal = [&](int which) { return Focal(options.gamma, pixels.cross_entropy(label(which))).loss; };
  return weighted(options.terms, focal(0), focal(1), focal(2));
}

// What smoothing sums up: sum_c w[c] (-log p[c]). A class of weight 0 is left out.
inline Float spread_of(const Pixels& pixels, const float* weights, float weight) {
  Float sum = fill(0.0f);
  for (int64_t c = 0; c < pixels.classes; ++c)
    if (weights[c] != 0) sum += weights[c] * load<Float>(pixels.below + c * kLanes);
  return weight * pixels.log_sum - sum;
}

// Sums of the classes: I, P and Y of overlap.
struct OverlapSums {
  static constexpr int kHeld = 256;  // vectors of pixels whose sums a float holds
  const int64_t classes;
  const Int lane = lane_numbers();
  float *hits, *predicted, *labelled;  // [classes, kLanes]
  int held = 0;

  OverlapSums(const Bcl& call, Arena& arena) : classes(has_overlap(call.options) ? classes_of(call) : 0) {
    for (float** piece : {&hits, &predicted, &labelled}) *piece = arena.take<float>(classes * kLanes);
  }

  void clear() {
    for (float* piece : {hits, predicted, labelled}) std::memset(piece, 0, classes * kLanes * sizeof(float));
    held = 0;
  }

  // Pixels of these weights, 0 where they are not valid.
  void add(const Pixels& pixels, Int label, Float weight, double* to) {
    const Int counts = weight != 0.0f;
    const Float factor = weight / pixels.sum;
    for (int64_t c = 0; c < classes; ++c) {
      float* const at = predicted + c * kLanes;
      store(at, load<Float>(at) + (counts ? factor * load<Float>(pixels.exps + c * kLanes) : fill(0.0f)), kLanes);
    }
    const Int place = (counts ? label : fill(0)) * kLanes + lane;
    const Float hit = counts ? weight * pixels.probability(label) : fill(0.0f);
    for (int i = 0; i < kLanes; ++i) hits[place[i]] += hit[i], labelled[place[i]] += weight[i];
    if (++held == kHeld) move(to);
  }

  // Add what is held to [3, classes].
  void move(double* to) {
    for (const float* piece : {hits, predicted, labelled})
      for (int64_t c = 0; c < classes; ++c, ++to)
        for (int i = 0; i < kLanes; ++i) *to += piece[c * kLanes + i];
    clear();
  }
};

// T^2 KL(softmax(t / T) || softmax(z / T)) of kLanes pixels, and the two softmaxes for its gradient.
struct Distillation {
  const int64_t classes;
  const float temperature;
  float *teacher, *student;             // [classes, kLanes]: exponentials; the student's where T is not 1
  Float of_teacher, of_student, value;  // inverse sums of these

  Distillation(const Bcl& call, Arena& arena)
      : classes(distills(call) ? classes_of(call) : 0), temperature(call.options.temperature),
        teacher(arena.take<float>(classes * kLanes)), student(arena.take<float>(classes * kLanes)) {}

  template <typename Logits>
  void evaluate(const Logits& logits, const Pixels& pixels) {
    const float inverse = 1 / temperature;
    const bool same = temperature == 1;
    const Float best = largest(logits, classes);
    Float sum = fill(0.0f), student_sum = same ? pixels.sum : fill(0.0f), cross = fill(0.0f);
    for (int64_t c = 0; c < classes; ++c) {
      const Float below = (logits(c) - best) * inverse, own = inverse * load<Float>(pixels.below + c * kLanes);
      const Float e = exp(below);
      store(teacher + c * kLanes, e, kLanes);
      sum += e, cross += below > -87.0f ? e * (below - own) : fill(0.0f);
      if (same) continue;
      const Float other = exp(own);
      store(student + c * kLanes, other, kLanes);
      student_sum += other;
    }
    of_teacher = 1.0f / sum, of_student = 1.0f / student_sum;
    value = temperature * temperature * (cross * of_teacher - log(sum) + log(student_sum));
  }
};

// What the gradient of cross-entropy, focal and boundary term takes from each label of pixels that have these weights.
template <bool kTerms>
Amounts<Float> amounts_of(const Pixels& pixels, const Labels& label, Float pixel_weight, const TermFactors& factors) {
  const BclOptions& options = pixels.call.options;
  const Float weight = class_weights(pixels.call, label(0)) * pixel_weight;
  const Float hard = label.selected() != 0 ? weight * factors.boundary : fill(0.0f);
  const Int has_rows = label(1) >= 0, has_columns = label(2) >= 0;
  Float own = weight * factors.ce;
  const auto slope = [&](int which, Float amount) {
    return amount != 0.0f ? amount * Focal(options.gamma, pixels.cross_entropy(label(which))).slope : fill(0.0f);
  };
  if (kTerms && factors.focal != 0) own += slope(0, weight * factors.focal);
  if (!kTerms || !options.focal_boundary || factors.boundary == 0)
    return bcmfnet::amounts_of(options.terms, own, hard, has_rows, has_columns);
  const Float each[3] = {slope(0, hard), slope(1, hard), slope(2, hard)};
  return bcmfnet::amounts_of(options.terms, own, each, has_rows, has_columns);
}

// What is left of a gradient, class by class, when the labels have taken theirs. Where nothing counts it is 0, whatever
// the logits are.
struct Taking {
  Int counts, own, rows, columns;
  Amounts<Float> amounts;
  bool flips;

  Taking() = default;
  Taking(const Bcl& call, const Labels& label, const Amounts<Float>& amounts, Int counts)
      : counts(counts), own(label(0)), rows(label(1)), columns(label(2)), amounts(amounts),
        flips(call.options.terms[1] != 0 || call.options.terms[2] != 0) {}

  Float operator()(int64_t c, Float g) const {
    const int32_t label = static_cast<int32_t>(c);
    g = counts ? g : fill(0.0f);
    g = own == label ? g - amounts.own : g;
    if (!flips) return g;
    g = rows == label ? g - amounts.rows : g;
    return columns == label ? g - amounts.columns : g;
  }
};

// Gradient of the logits of kLanes pixels: of cross-entropy and boundary term.
struct Gradient {
  const float* exps;
  const Float factor;
  const Taking taking;

  Gradient(const Pixels& pixels, const Labels& labels, const Amounts<Float>& amounts)
      : exps(pixels.exps), factor(amounts.total / pixels.sum),
        taking(pixels.call, labels, amounts, amounts.total != 0.0f) {}

  Float operator()(int64_t c) const { return taking(c, factor * load<Float>(exps + c * kLanes)); }
};

// The gradient of all terms: p (total + of_predicted P') - teacher - spread w - what labels take. `total` is what is the
// same for all classes, of overlap too: p (g - sum p g) with g = P' + I' e[y].
struct TermGradient {
  const float *exps, *of_predicted = nullptr, *teacher = nullptr, *student = nullptr, *spread_weights = nullptr;
  Float factor, overlap = fill(0.0f), of_teacher = fill(0.0f), of_student = fill(0.0f), spread = fill(0.0f);
  Taking taking{};

  // Pixels of these weights; `slopes` of their image, or null.
  TermGradient(
      const Run& run, const Pixels& pixels, const Distillation& distillation, const Labels& label, Float pixel_weight,
      const float* slopes)
      : exps(pixels.exps) {
    Amounts<Float> amounts = amounts_of<true>(pixels, label, pixel_weight, run.factors);
    const Float valid = label(0) >= 0 ? pixel_weight : fill(0.0f);
    Float total = amounts.total;
    Int counts = total != 0.0f;
    if (run.factors.spread != 0) {
      spread = valid * run.factors.spread, spread_weights = run.spread_weights;
      total += spread * run.spread_weight, counts |= spread != 0.0f;
    }
    if (slopes) {
      Float sum = fill(0.0f);
      for (int64_t c = 0; c < pixels.classes; ++c) sum += slopes[c] * load<Float>(exps + c * kLanes);
      const Int known = label(0) >= 0 ? label(0) : fill(0);
      const Float of_hits = gather(slopes + pixels.classes, known) * pixels.probability(label(0));
      of_predicted = slopes, overlap = valid / pixels.sum, counts |= valid != 0.0f;
      total -= overlap * sum + valid * of_hits, amounts.own -= valid * of_hits;
    }
    if (distills(run.call)) {
      const Float amount = (run.call.options.everywhere ? pixel_weight : valid) * run.factors.distillation;
      teacher = distillation.teacher, of_teacher = amount * distillation.of_teacher, counts |= amount != 0.0f;
      if (distillation.temperature == 1) {
        total += amount;
      } else {
        student = distillation.student, of_student = amount * distillation.of_student;
      }
    }
    factor = total / pixels.sum;
    taking = Taking(pixels.call, label, amounts, counts);
  }

  Float operator()(int64_t c) const {
    Float g = (of_predicted ? factor + overlap * of_predicted[c] : factor) * load<Float>(exps + c * kLanes);
    if (student) g += of_student * load<Float>(student + c * kLanes);
    if (teacher) g -= of_teacher * load<Float>(teacher + c * kLanes);
    if (spread_weights) g -= spread * spread_weights[c];
    return taking(c, g);
  }
};

}  // namespace
}  // namespace bcmfnet::BCM_ISA
