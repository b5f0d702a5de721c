// Per-pixel arithmetic of the Boundary Corrected Loss, for C++ and CUDA alike. F is float, or a vector of floats.
#pragma once

#include <cstdint>

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

// Sum of the terms that have a coefficient.
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

}  // namespace bcmfnet
