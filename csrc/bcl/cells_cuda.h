// A cell is what lies between two source rows and two source columns. A block has the cells of 32 columns between two
// source rows: each lane has those output columns whose left source column is its own, each warp one output row at a
// time.
#pragma once

#include "bcl/pixels_cuda.h"
#include "common/bilinear.h"

namespace bcmfnet {
namespace {

constexpr int kWarps = 4;  // output rows that a block has in hand

// The gradient of a block's cells. A thread adds that of its output row over the columns, as a sum and as the part of
// the right source column; the block then adds the rows.
template <int K>
struct CellRows {
  float *left, *step, *sum, *right;  // [classes, kCells] of a warp: logits at the lane's columns; the gradient
  float *upper, *lower;              // [classes, kNodes] of the block
  const int classes;

  __device__ CellRows(float* shared, int classes) : classes(classes) {
    const int plane = classes * kCells, warp = threadIdx.x / 32;
    left = shared + 4 * warp * plane, step = left + plane, sum = step + plane, right = sum + plane;
    upper = shared + 4 * kWarps * plane, lower = upper + classes * kNodes;
  }

  // Logits of a row at the lane's source columns. Few loads at a time: all would not fit the registers.
  template <typename Corners>
  __device__ void interpolate(const Corners& corners, int first_class, int lane) {
#pragma unroll 4
    for (int c = 0; c < classes; ++c) {
      const float from = corners.left(first_class + c);
      left[c * kCells + lane] = from, step[c * kCells + lane] = corners.to_right(first_class + c);
    }
  }
  __device__ void clear_block() {
    for (int i = threadIdx.x; i < 2 * classes * kNodes; i += blockDim.x) upper[i] = 0;
  }
  __device__ void clear_row(int lane) {
    for (int c = 0; c < classes; ++c) sum[c * kCells + lane] = right[c * kCells + lane] = 0;
  }
  __device__ void take(int label, int lane, float weight_x, float amount) {
    sum[label * kCells + lane] -= amount;
    right[label * kCells + lane] -= weight_x * amount;
  }
  // Add the rows that the warps hold, `weights_y` of each to its lower source row.
  __device__ void fold(const float* weights_y, int rows) {
    const int own = threadIdx.x / 32, plane = classes * kCells;
    const float *sums = sum - 4 * own * plane, *rights = right - 4 * own * plane;
    for (int i = threadIdx.x; i < classes * kNodes; i += blockDim.x) {
      const int c = i / kNodes, node = i % kNodes, at = c * kCells + node;
      float above = upper[i], below = lower[i];
      for (int row = 0; row < rows; ++row) {
        const int held = at + 4 * row * plane;
        const float own_part = node < kCells ? sums[held] - rights[held] : 0.0f;
        const float value = own_part + (node > 0 ? rights[held - 1] : 0.0f);
        above = fmaf(1 - weights_y[row], value, above), below = fmaf(weights_y[row], value, below);
      }
      upper[i] = above, lower[i] = below;
    }
  }
};

// Where a thread is in the grid of cells.
struct Place {
  int image, row, cell, lane;
  int begin, end;      // output rows of the row of cells
  int begin_x, end_x;  // output columns of the thread's cell
  bool inside, has_right, has_below;

  __device__ explicit Place(const Bcl& call, bool align_corners = false) : lane(threadIdx.x % 32) {
    const int64_t height = call.logits.height, width = call.logits.width;
    image = static_cast<int>(blockIdx.x / static_cast<unsigned>(height));
    row = static_cast<int>(blockIdx.x % static_cast<unsigned>(height));
    cell = static_cast<int>(blockIdx.y) * kCells + lane;
    begin = static_cast<int>(first_output(row, height, call.target.height, align_corners));
    end = static_cast<int>(first_output(row + 1, height, call.target.height, align_corners));
    inside = cell < width;
    begin_x = inside ? static_cast<int>(first_output(cell, width, call.target.width, align_corners)) : 0;
    end_x = inside ? static_cast<int>(first_output(cell + 1, width, call.target.width, align_corners)) : 0;
    has_right = high_of(cell, width, call.target.width) != cell;
    has_below = high_of(row, height, call.target.height) != row;
  }
};

// A softmax to base 2: exp2(exponent(z, shift)) * scale, and the logarithm of the sum.
struct Normalizer {
  float shift, scale, log_sum;
};

// Puts the exponentials of a pixel's logits in their place.
template <int K>
__device__ Normalizer exponentiate(float (&z)[K]) {
  float largest = -kInfinity, total = 0;
#pragma unroll
  for (int i = 0; i < K; ++i) largest = fmaxf(largest, z[i]);
  const float shift = kLog2E * largest;
#pragma unroll
  for (int i = 0; i < K; ++i) z[i] = exp2_of(exponent(z[i], shift)), total += z[i];
  return {shift, 1 / total, log2f(total)};
}

}  // namespace
}  // namespace bcmfnet
