// What the terms beside cross-entropy make of kLanes pixels, each in a struct or a function of its own, and the gradient
// of all terms together.
#pragma once

#include "bcl/pixels_cpu.h"

namespace bcmfnet::BCM_ISA {
namespace {

// The focal loss (1 - p)^gamma ce of labels, and its derivative with respect to their cross-entropy.
struct Focal {
  Float loss = fill(0.0f), slope = fill(1.0f);

  Focal() = default;
  Focal(const Pixels& pixels, Int label) : loss(pixels.cross_entropy(label)) {
    const float gamma = pixels.call.options.gamma;
    if (gamma == 0) return;
    const Float ce = loss, p = pixels.probability(label), miss = 1.0f - p;
    const Float power = gamma == 2 ? miss : exp((gamma - 1) * log(miss));  // (1 - p)^(gamma - 1)
    const Int certain = miss <= 0.0f;
    loss = certain ? fill(0.0f) : power * miss * ce;
    slope = certain ? fill(0.0f) : power * (miss + gamma * p * (ce < 87.0f ? ce : fill(0.0f)));
  }
};

// The boundary term: the sum of the cross-entropies, or focal losses, that have a coefficient. The first ce is known.
template <bool kTerms>
Float boundary_term(const Pixels& pixels, const Labels& label, Float own) {
  const BclOptions& options = pixels.call.options;
  if (!kTerms || !options.focal_boundary) return pixels.sum_of(options.terms, label, own);
  const auto focal = [&](int which) { return Focal(pixels, label(which)).loss; };
  return weighted(options.terms, focal(0), focal(1), focal(2));
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
    alignas(64) int32_t place[kLanes];
    alignas(64) float hit[kLanes], share[kLanes];
    store(place, (counts ? label : fill(0)) * kLanes + lane, kLanes);
    store(hit, counts ? weight * pixels.probability(label) : fill(0.0f), kLanes);
    store(share, weight, kLanes);
    for (int i = 0; i < kLanes; ++i) hits[place[i]] += hit[i], labelled[place[i]] += share[i];
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

// What the gradient of cross-entropy, focal and boundary term takes from each label of pixels that have these weights;
// `focal` is that of their own labels.
template <bool kTerms>
Amounts<Float> amounts_of(
    const Pixels& pixels, const Labels& label, Float pixel_weight, const Focal& focal, const TermFactors& factors) {
  const BclOptions& options = pixels.call.options;
  const Float weight = class_weights(pixels.call, label(0)) * pixel_weight;
  Float own = weight * factors.ce;
  if (kTerms && factors.focal != 0) own += weight != 0.0f ? weight * factors.focal * focal.slope : fill(0.0f);
  if (factors.boundary == 0) return {own, fill(0.0f), fill(0.0f), own};
  const Float hard = label.selected() != 0 ? weight * factors.boundary : fill(0.0f);
  const Int has_rows = label(1) >= 0, has_columns = label(2) >= 0;
  const auto slope = [&](int which, Float amount) {
    return amount != 0.0f ? amount * Focal(pixels, label(which)).slope : fill(0.0f);
  };
  if (!kTerms || !options.focal_boundary)
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

// Gradient of the logits of kLanes pixels: of cross-entropy and boundary term, or of what else differs by label alone.
struct Gradient {
  const float* exps;
  const Float factor;
  const Taking taking;

  Gradient(const Pixels& pixels, const Labels& labels, const Amounts<Float>& amounts)
      : Gradient(pixels.exps, amounts.total / pixels.sum, {pixels.call, labels, amounts, amounts.total != 0.0f}) {}
  Gradient(const float* exps, Float factor, const Taking& taking) : exps(exps), factor(factor), taking(taking) {}

  Float operator()(int64_t c) const { return taking(c, factor * load<Float>(exps + c * kLanes)); }
};

// The gradient of all terms: p (total + of_predicted P') - teacher - spread w - what labels take. `total` is what is the
// same for all classes, of overlap too: p (g - sum p g) with g = P' + I' e[y].
struct TermGradient {
  enum Part { kOverlap = 1, kSpread = 2, kTeacher = 4, kStudent = 8, kAll = 15 };  // that differ by class
  const float *exps, *of_predicted, *spread_weights, *teacher, *student;
  Float factor, overlap, spread, of_teacher, of_student;
  Taking taking;
  int parts = 0;

  // Pixels of these weights; `slopes` of their image, or null.
  TermGradient(
      const Run& run, const Pixels& pixels, const Focal& focal, const Distillation& distillation, const Labels& label,
      Float pixel_weight, const float* slopes)
      : exps(pixels.exps), of_predicted(slopes), spread_weights(run.spread.of_class), teacher(distillation.teacher),
        student(distillation.student) {
    Amounts<Float> amounts = amounts_of<true>(pixels, label, pixel_weight, focal, run.factors);
    const Float valid = label(0) >= 0 ? pixel_weight : fill(0.0f);
    Float total = amounts.total;
    Int counts = total != 0.0f;
    if (run.factors.spread != 0) {
      parts |= kSpread, spread = valid * run.factors.spread, counts |= spread != 0.0f;
      total += spread * run.spread.sum;
    }
    if (slopes) {
      Float sum = fill(0.0f);
      for (int64_t c = 0; c < pixels.classes; ++c) sum += slopes[c] * load<Float>(exps + c * kLanes);
      const Int known = label(0) >= 0 ? label(0) : fill(0);
      const Float of_hits = gather(slopes + pixels.classes, known) * pixels.probability(label(0));
      parts |= kOverlap, overlap = valid / pixels.sum, counts |= valid != 0.0f;
      total -= overlap * sum + valid * of_hits, amounts.own -= valid * of_hits;
    }
    if (distills(run.call)) {
      const Float amount = (run.call.options.everywhere ? pixel_weight : valid) * run.factors.distillation;
      const bool same = distillation.temperature == 1;
      parts |= same ? kTeacher : kTeacher | kStudent, counts |= amount != 0.0f;
      of_teacher = amount * distillation.of_teacher, of_student = amount * distillation.of_student;
      total += same ? amount : fill(0.0f);
    }
    factor = total / pixels.sum;
    taking = Taking(pixels.call, label, amounts, counts);
  }

  // What smoothing spreads, without the weights of the classes; it is then no part any more.
  Float take_spread() {
    const Float taken = parts & kSpread ? spread : fill(0.0f);
    parts &= ~kSpread;
    return taken;
  }

  // The gradient as a function of the class, of those parts that `kParts` allows.
  template <int kParts>
  struct Of {
    const TermGradient& all;

    Float operator()(int64_t c) const {
      const auto has = [&](Part part) { return kParts == kAll ? (all.parts & part) != 0 : (kParts & part) != 0; };
      const Float factor = has(kOverlap) ? all.factor + all.overlap * all.of_predicted[c] : all.factor;
      Float g = factor * load<Float>(all.exps + c * kLanes);
      if (has(kStudent)) g += all.of_student * load<Float>(all.student + c * kLanes);
      if (has(kTeacher)) g -= all.of_teacher * load<Float>(all.teacher + c * kLanes);
      if (has(kSpread)) g -= all.spread * all.spread_weights[c];
      return all.taking(c, g);
    }
  };

  // Calls use(gradient) with a loop of its own for each part alone.
  template <typename Use>
  void use(Use use) const {
    switch (parts) {
      case 0: return use(Gradient(exps, factor, taking));
      case kOverlap: return use(Of<kOverlap>{*this});
      case kSpread: return use(Of<kSpread>{*this});
      case kTeacher: return use(Of<kTeacher>{*this});
      case kTeacher | kStudent: return use(Of<kTeacher | kStudent>{*this});
      default: return use(Of<kAll>{*this});
    }
  }
};

}  // namespace
}  // namespace bcmfnet::BCM_ISA
