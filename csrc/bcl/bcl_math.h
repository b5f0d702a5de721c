// The arithmetic of the Boundary Corrected Loss, for C++ and CUDA alike. F is float, or a vector of floats.
#pragma once

#include <cmath>
#include <cstdint>

#include "bcl/bcl.h"
#include "common/host_device.h"

namespace bcmfnet {

constexpr int kMaxScore = 65535;    // scores are compared on a grid of 16 bits
constexpr float kScoreUnit = 1024;  // its steps to a nat

// The position that a flip reads along an axis: neighbouring blocks of `step` change places, or windows of 2 * step are
// reversed. One that would leave the image stays.
template <typename Integer>
BCM_HD Integer flipped(Integer position, Integer length, Integer step, Integer offset, bool mirror) {
  const Integer i = position + offset, block = i / step, within = i % step;
  const Integer window = block - (block & 1);
  const Integer j = mirror ? (2 * window + 2) * step - 1 - i : (block ^ 1) * step + within;
  const Integer result = j - offset;
  return result < 0 || result >= length ? position : result;
}

// Sum of the cross-entropies that have a coefficient.
template <typename F>
BCM_HD F weighted(const float* coefficients, F own, F rows, F columns) {
  F sum{};
  if (coefficients[0] != 0) sum += coefficients[0] * own;
  if (coefficients[1] != 0) sum += coefficients[1] * rows;
  if (coefficients[2] != 0) sum += coefficients[2] * columns;
  return sum;
}

// A score on the grid, before it is cut to an integer: nearest step, at most the largest, 0 for NaN.
template <typename F>
BCM_HD F on_grid(F score) {
  const F steps = score * kScoreUnit + 0.5f, largest = F{} + static_cast<float>(kMaxScore);
  const F bounded = steps > largest ? largest : steps;
  return bounded == bounded ? bounded : F{};
}

// What a pixel adds to the gradient of its logits: total * softmax - own e[y] - rows e[y_r] - columns e[y_c].
template <typename F>
struct Amounts {
  F own, rows, columns, total;
};

// Of a pixel whose cross-entropy has the factor `ce`, and the boundary term of its labels those of `boundary`.
template <typename F, typename Mask>
BCM_HD Amounts<F> amounts_of(const float* terms, F ce, const F (&boundary)[3], Mask has_rows, Mask has_columns) {
  Amounts<F> result;
  result.own = ce + terms[0] * boundary[0];
  result.rows = has_rows ? terms[1] * boundary[1] : F{};
  result.columns = has_columns ? terms[2] * boundary[2] : F{};
  result.total = result.own + result.rows + result.columns;
  return result;
}

template <typename F, typename Mask>
BCM_HD Amounts<F> amounts_of(const float* terms, F ce, F boundary, Mask has_rows, Mask has_columns) {
  const F same[3] = {boundary, boundary, boundary};
  return amounts_of(terms, ce, same, has_rows, has_columns);
}

// What the sums over all pixels are divided by. A gradient of cross-entropy and boundary term alone is added up in units
// of its first term; `scale` is what a unit is worth, and `boundary_factor` the boundary term's own factor in these
// units.
struct Divisors {
  double inverse[3];  // of the sum of the weights, of the number of selected or of valid pixels, and of distillation
  float scale, boundary_factor;
};

// NaN where the weights have no finite sum: nobody shall train on. `distilled` is the sum of the weights of pixels.
BCM_HD Divisors divisors_of(
    const BclOptions& options, bool usable, double weight, int64_t valid, int64_t selected, double distilled = 0) {
  const double divisor = static_cast<double>(options.by_valid ? valid : selected);
  Divisors result{{weight > 0 ? 1 / weight : 1, divisor > 0 ? 1 / divisor : 1, distilled > 0 ? 1 / distilled : 1}, 0, 0};
  for (double& inverse : result.inverse) inverse = usable ? inverse : __builtin_nan("");
  const double ce = options.ce_weight * result.inverse[0], boundary = options.boundary_weight * result.inverse[1];
  result.scale = static_cast<float>(options.ce_weight != 0 ? ce : boundary);
  result.boundary_factor = static_cast<float>(options.ce_weight != 0 ? boundary / ce : 1);
  return result;
}

// What the gradient of a pixel multiplies each term with, before the weights of its class and its own. Smoothing spreads
// `spread` times the class weight over each class.
struct TermFactors {
  float ce, boundary, focal, spread, distillation;
};

// `scales` are the inverse divisors; where no label has a weight (`weighs`), nothing is smoothed either.
template <typename Real>
BCM_HD TermFactors term_factors_of(const BclOptions& options, int64_t classes, const Real* scales, bool weighs) {
  const Real ce = options.ce_weight * scales[0];
  return {
      static_cast<float>(ce * (1 - options.smoothing)), static_cast<float>(options.boundary_weight * scales[1]),
      static_cast<float>(options.focal_weight * scales[0]),
      weighs ? static_cast<float>(ce * (options.smoothing / static_cast<float>(classes))) : 0.0f,
      static_cast<float>(options.distillation_weight * options.temperature * scales[2])};
}

// The loss of one class by one score of overlap, and its derivatives with respect to P and I.
struct ClassLoss {
  double loss, of_predicted, of_hits;
};

// Of the score Value(kDice + which), and the sums I, P and Y of the class.
BCM_HD ClassLoss class_loss_of(const Overlap& overlap, int which, double hits, double predicted, double labelled) {
  constexpr double kEps = 1e-7;
  const bool dice = which == 0, tversky = which == 2;
  const double hit = dice ? 2 : 1, alpha = tversky ? overlap.alpha : 1, beta = tversky ? overlap.beta : 1;
  const double of_hits = dice ? 0 : 1 - alpha - beta;
  const double numerator = hit * hits + overlap.smooth;
  const double raw = of_hits * hits + alpha * predicted + beta * labelled + overlap.smooth;
  const double divisor = raw < kEps ? kEps : raw, slope = raw >= kEps ? numerator / (divisor * divisor) : 0;
  const double score = numerator / divisor, bounded = score < kEps ? kEps : score;
  const double outer = !overlap.log ? -1 : score >= kEps ? -1 / bounded : 0;
  return {overlap.log ? -log(bounded) : 1 - score, -outer * slope * alpha, outer * (hit / divisor - slope * of_hits)};
}

// Weight of a class among those whose losses are added up, and among those by which the sum is divided.
struct ClassShare {
  double added, divides;
};

BCM_HD ClassShare class_share_of(const Bcl& call, int64_t c, double labelled) {
  const bool binary = call.options.binary, present = labelled > 0;
  const double weight = binary ? c == 1 : call.class_weight ? call.class_weight[c] : 1;
  const Overlap::Absent absent = call.options.overlap.absent;
  return {present || absent == Overlap::kCount ? weight : 0, present || absent != Overlap::kSkip ? weight : 0};
}

// The loss of the means of its terms [kValues].
BCM_HD double loss_of(const BclOptions& options, const double* means) {
  const float* overlap = options.overlap.weight;
  const float weights[kValues] = {options.ce_weight, options.boundary_weight, options.focal_weight, overlap[0],
                                  overlap[1], overlap[2], options.distillation_weight};
  double sum = 0;
  for (int i = 0; i < kValues; ++i) sum += weights[i] != 0 ? weights[i] * means[i] : 0;
  return sum;
}

BCM_HD double loss_of(const BclOptions& options, double ce, double boundary) {
  const double means[kValues] = {ce, boundary};
  return loss_of(options, means);
}

}  // namespace bcmfnet
