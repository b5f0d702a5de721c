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

// Of a pixel whose cross-entropy and whose boundary term have the factors `ce` and `boundary`.
template <typename F, typename Mask>
BCM_HD Amounts<F> amounts_of(const float* terms, F ce, F boundary, Mask has_rows, Mask has_columns) {
  Amounts<F> result;
  result.own = ce + terms[0] * boundary;
  result.rows = has_rows ? terms[1] * boundary : F{};
  result.columns = has_columns ? terms[2] * boundary : F{};
  result.total = result.own + result.rows + result.columns;
  return result;
}

// What the sums over all pixels are divided by. A gradient is added up in units of its first term; `scale` is what a
// unit is worth, and `boundary_factor` the boundary term's own factor in these units.
struct Divisors {
  double inverse[2];  // of the sum of the class weights, and of the number of selected or of valid pixels
  float scale, boundary_factor;
};

// NaN where the class weights have no finite sum: nobody shall train on.
BCM_HD Divisors divisors_of(const BclOptions& options, bool usable, double weight, int64_t valid, int64_t selected) {
  const double divisor = static_cast<double>(options.by_valid ? valid : selected);
  Divisors result{{weight > 0 ? 1 / weight : 1, divisor > 0 ? 1 / divisor : 1}, 0, 0};
  if (!usable) result.inverse[0] = result.inverse[1] = __builtin_nan("");
  const double ce = options.ce_weight * result.inverse[0], boundary = options.boundary_weight * result.inverse[1];
  result.scale = static_cast<float>(options.ce_weight != 0 ? ce : boundary);
  result.boundary_factor = static_cast<float>(options.ce_weight != 0 ? boundary / ce : 1);
  return result;
}

// The loss of the means of its two terms.
BCM_HD double loss_of(const BclOptions& options, double ce, double boundary) {
  const double first = options.ce_weight != 0 ? options.ce_weight * ce : 0;
  return first + (options.boundary_weight != 0 ? options.boundary_weight * boundary : 0);
}

}  // namespace bcmfnet
