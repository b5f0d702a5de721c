// Cells by output columns: a thread has a column over all rows of a block, so that its logits change along a straight
// line, and neither the weights nor the corners do.
#pragma once

#include "bcl/cells_cuda.h"

namespace bcmfnet {
namespace {

// Logits between four source pixels.
struct Lerped {
  const float *top, *bottom;
  int64_t right, stride;
  float weight_x, weight_y;

  __device__ Lerped(const Bcl& call, int64_t image, int y, int x)
      : Lerped(call, image, source_of(y, call.logits.height, call.target.height),
               source_of(x, call.logits.width, call.target.width)) {}
  __device__ Lerped(const Bcl& call, int64_t image, const Source& row, const Source& column)
      : stride(call.logits.channel_stride), weight_x(column.weight), weight_y(row.weight) {
    const View& logits = call.logits;
    top = static_cast<const float*>(logits.data) + offset_of(logits, image, 0, row.low, column.low);
    bottom = top + (row.high - row.low) * logits.row_stride;
    right = (column.high - column.low) * logits.column_stride;
  }
  __device__ float column(int64_t at) const { return fmaf(weight_y, bottom[at] - top[at], top[at]); }
  __device__ float left(int64_t c) const { return column(c * stride); }
  __device__ float to_right(int64_t c) const { return column(c * stride + right) - left(c); }
  __device__ float operator()(int64_t c) const { return fmaf(weight_x, to_right(c), left(c)); }
  template <int K>
  __device__ void read(int first, int classes, float* z) const {
#pragma unroll 4
    for (int i = 0; i < K; ++i) z[i] = first + i < classes ? (*this)(first + i) : -kInfinity;
  }
};

constexpr float kLeastTotal = 0x1p-100f;  // A sum that may have lost exponentials to underflow is taken again.

// Exponentials of the exponents that `of(i)` gives, and their sum; all lose `shift` where some might be lost.
template <int K>
struct Exponentials {
  float z[K], total = 0, shift = 0;

  template <typename Of>
  __device__ explicit Exponentials(const Of& of) {
#pragma unroll
    for (int i = 0; i < K; ++i) z[i] = exp2_of(of(i)), total += z[i];
    if (total > kLeastTotal) return;
    shift = -kInfinity, total = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) shift = fmaxf(shift, of(i));
#pragma unroll
    for (int i = 0; i < K; ++i) z[i] = exp2_of(of(i) - shift), total += z[i];
  }
};

// A block of cells: where its output columns and rows lie between source columns and rows.
struct CellBlock {
  static constexpr int kEdges = kNodes + 3;

  const Bcl& call;
  // [kEdges], shared: the first column of each cell; the first row, and that of the row of cells below. All of it is
  // written, since the compiler reads 16 bytes at once.
  int* const edges;
  const int64_t image, row, lower_row, first_cell;

  // The edges can be read after a barrier.
  __device__ CellBlock(const Bcl& call, int* edges)
      : call(call), edges(edges), image(blockIdx.x / static_cast<unsigned>(call.logits.height)),
        row(blockIdx.x % static_cast<unsigned>(call.logits.height)),
        lower_row(high_of(row, call.logits.height, call.target.height)),
        first_cell(static_cast<int64_t>(blockIdx.y) * kCells) {
    if (threadIdx.x >= kEdges) return;
    const int below = static_cast<int>(threadIdx.x) - kNodes;
    const View &logits = call.logits, &target = call.target;
    edges[threadIdx.x] = static_cast<int>(
        below >= 0 ? first_output(row + below, logits.height, target.height)
                   : first_output(first_cell + threadIdx.x, logits.width, target.width));
  }
  __device__ int begin_y() const { return edges[kNodes]; }
  __device__ int end_y() const { return edges[kNodes + 1]; }
  __device__ int begin_x() const { return edges[0]; }
  __device__ int end_x() const { return edges[kCells]; }
};

// The output columns of a block: the node to the left of each, and the weight of the one to the right.
struct Across {
  struct Column {
    int node;
    bool has_right;
    float weight;
  };
  const CellBlock& block;
  const int64_t ahead_of_edge;  // lerp_weight: how far a column is ahead of its source, in steps
  const unsigned cell_width;
  const float per_step;

  __device__ explicit Across(const CellBlock& block)
      : block(block),
        ahead_of_edge((2 * static_cast<int64_t>(block.begin_x()) + 1) * block.call.logits.width -
                      block.call.target.width - 2 * block.call.target.width * block.first_cell),
        cell_width(static_cast<unsigned>(2 * block.call.target.width)),
        per_step(1 / static_cast<float>(2 * block.call.target.width)) {}
  __device__ Column operator()(int x) const {
    const int64_t width = block.call.logits.width, reaches = ahead_of_edge + 2 * width * (x - block.begin_x());
    const unsigned ahead = reaches > 0 && x < block.end_x() ? static_cast<unsigned>(reaches) : 0;
    const int node = static_cast<int>(ahead / cell_width);
    const int64_t cell = block.first_cell + node;
    const bool has_right = high_of(cell, width, block.call.target.width) != cell;
    return {node, has_right, has_right ? static_cast<float>(ahead - node * cell_width) * per_step : 0.0f};
  }
};

// The output rows of a block: the weight of the lower source row.
struct Down {
  const int begin, step, first;
  const float per_step;

  __device__ explicit Down(const CellBlock& block)
      : begin(block.begin_y()),
        step(block.lower_row != block.row ? static_cast<int>(2 * block.call.logits.height) : 0),
        first(step != 0 ? static_cast<int>((2 * begin + 1) * block.call.logits.height - block.call.target.height -
                                           2 * block.call.target.height * block.row)
                        : 0),
        per_step(1 / static_cast<float>(2 * block.call.target.height)) {}
  __device__ float operator()(int y) const {
    return fmaxf(static_cast<float>(first + step * (y - begin)) * per_step, 0.0f);
  }
};

// Reads the nodes of a block, [classes, kNodes]: exponents to base 2 at the upper source row, and on to the lower one.
// A softmax does not change where all logits of a node lose the same: their largest, so that exponents are at most 0.
template <int K>
__device__ void read_nodes(const CellBlock& block, int classes, float2* nodes) {
  const int node = threadIdx.x;
  if (node >= kNodes) return;
  const View& logits = block.call.logits;
  const int64_t column = block.first_cell + node < logits.width ? block.first_cell + node : logits.width - 1;
  const float* from = static_cast<const float*>(logits.data) + offset_of(logits, block.image, 0, block.row, column);
  const int64_t down = (block.lower_row - block.row) * logits.row_stride;
  float upper[K], lower[K], most_upper = -kInfinity, most_lower = -kInfinity;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (i >= classes) continue;
    upper[i] = from[i * logits.channel_stride], lower[i] = from[i * logits.channel_stride + down];
    most_upper = fmaxf(most_upper, upper[i]), most_lower = fmaxf(most_lower, lower[i]);
  }
  const float shift_upper = kLog2E * most_upper, shift_lower = kLog2E * most_lower;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (i >= classes) continue;
    const float at = exponent(upper[i], shift_upper);
    nodes[i * kNodes + node] = make_float2(at, exponent(lower[i], shift_lower) - at);
  }
}

// Exponents of a class along a column: at the upper source row, and on to the lower one.
__device__ inline float2 line_of(const float2* nodes, const Across::Column& column) {
  const float2 left = nodes[column.node], right = nodes[column.node + column.has_right];
  return make_float2(fmaf(column.weight, right.x - left.x, left.x), fmaf(column.weight, right.y - left.y, left.y));
}

}  // namespace
}  // namespace bcmfnet
