// Cells by output columns: a thread has a column over all rows of a block, so that its logits change along a straight
// line, and neither the weights nor the corners do.
#pragma once

#include "bcl/cells_cuda.h"

namespace bcmfnet {
namespace {

// Blocks of up to 19 sums a lane on a multiprocessor: for sm_100 a third one would spill 12 bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kResident = 2;
#else
constexpr int kResident = 3;
#endif

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

// Exponentials of the exponents that `of(i)` gives, and their sum; all lose `shift` where some might be lost, which are
// `steep`.
template <int K>
struct Exponentials {
  // An exponent below which exponentials might be lost; one that is not a number is no better.
  __device__ static bool is_steep(float exponent) { return !(exponent >= -100); }
  float z[K], total = 0, shift = 0;

  template <typename Of>
  __device__ explicit Exponentials(const Of& of, bool steep = true) {
#pragma unroll
    for (int i = 0; i < K; ++i) z[i] = exp2_of(of(i)), total += z[i];
    if (!steep || total > kLeastTotal) return;
    shift = -kInfinity, total = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) shift = fmaxf(shift, of(i));
#pragma unroll
    for (int i = 0; i < K; ++i) z[i] = exp2_of(of(i) - shift), total += z[i];
  }
};

// A block of cells: where its output columns and rows lie between source columns and rows.
struct CellBlock {
  static constexpr int kEdges = kNodes + kCellRows + 1;

  const Bcl& call;
  const CellTile& tile;
  // [kEdges], shared: the first column of each cell; the first row of each row of cells. All of it is written, since the
  // compiler reads 16 bytes at once.
  int* const edges;
  const int image, row, first_cell;
  const bool align;

  // The edges can be read after a barrier.
  __device__ CellBlock(const Bcl& call, const CellTile& tile, int* edges, bool align = false)
      : call(call), tile(tile), edges(edges), image(static_cast<int>(blockIdx.x / tile.strips)),
        row(static_cast<int>(blockIdx.x % tile.strips) * tile.rows),
        first_cell(static_cast<int>(blockIdx.y) * tile.cells), align(align) {
    if (threadIdx.x >= kEdges) return;
    const int below = static_cast<int>(threadIdx.x) - kNodes;
    const View &logits = call.logits, &target = call.target;
    edges[threadIdx.x] = static_cast<int>(
        below >= 0 ? first_output(row + below, logits.height, target.height, align)
                   : first_output(first_cell + threadIdx.x, logits.width, target.width, align));
  }
  // Rows of cells that there are.
  __device__ int rows() const { return static_cast<int>(smaller_of<int64_t>(call.logits.height - row, tile.rows)); }
  __device__ int64_t lower_row(int below = 0) const {
    return high_of(row + below, call.logits.height, call.target.height);
  }
  // The output rows of a row of cells.
  __device__ int begin_y(int below = 0) const { return edges[kNodes + below]; }
  __device__ int end_y(int below = 0) const { return edges[kNodes + below + 1]; }
  __device__ int begin_x() const { return edges[0]; }
  __device__ int end_x() const { return edges[tile.cells]; }
};

// The output columns of a block: the node to the left of each, and the weight of the one to the right.
struct Across {
  struct Column {
    int node;
    bool has_right;
    float weight;
  };
  const CellBlock& block;
  const Positions positions;
  const int64_t ahead_of_edge;  // lerp_weight: how far a column is ahead of its source, in steps
  const unsigned cell_width;
  const float per_step;

  __device__ explicit Across(const CellBlock& block)
      : block(block), positions(positions_of(block.call.logits.width, block.call.target.width, block.align)),
        ahead_of_edge(positions.first + positions.step * block.begin_x() - positions.divisor * block.first_cell),
        cell_width(static_cast<unsigned>(positions.divisor)), per_step(1 / static_cast<float>(positions.divisor)) {}
  __device__ Column operator()(int x) const {
    const int64_t width = block.call.logits.width, reaches = ahead_of_edge + positions.step * (x - block.begin_x());
    const unsigned ahead = reaches > 0 && x < block.end_x() ? static_cast<unsigned>(reaches) : 0;
    const int node = static_cast<int>(ahead / cell_width);
    const int64_t cell = block.first_cell + node;
    const bool has_right = high_of(cell, width, block.call.target.width) != cell;
    return {node, has_right, has_right ? static_cast<float>(ahead - node * cell_width) * per_step : 0.0f};
  }
};

// The output rows of a row of cells, some at a time: along a run the weight of the lower source row grows by the same
// step.
struct Down {
  static constexpr int kRun = 8;  // rows at most, so that an exponential that follows from the one before stays precise

  const CellBlock& block;
  const Positions positions;
  const float per_step;
  int begin, end, straight, step, first;  // before `straight` the weight is 0: these rows are at the image's upper edge

  __device__ explicit Down(const CellBlock& block)
      : block(block), positions(positions_of(block.call.logits.height, block.call.target.height, block.align)),
        per_step(1 / static_cast<float>(positions.divisor)) {
    go_to(0);
  }
  __device__ void go_to(int below) {
    const int64_t row = block.row + below;
    begin = block.begin_y(below), end = block.end_y(below);
    step = block.lower_row(below) != row ? static_cast<int>(positions.step) : 0;
    first = step != 0 ? static_cast<int>(positions.first + positions.step * begin - positions.divisor * row) : 0;
    straight = first < 0 ? min(begin + (step - 1 - first) / step, end) : begin;
  }
  __device__ float operator()(int y) const {
    return fmaxf(static_cast<float>(first + step * (y - begin)) * per_step, 0.0f);
  }
  // Of the run that starts with a row.
  __device__ int rows(int y) const { return min((y < straight ? straight : end) - y, kRun); }
  __device__ float step_of(int y) const { return y < straight ? 0.0f : static_cast<float>(step) * per_step; }
};

template <typename T, int K>
__device__ void read_logits(const View& logits, int64_t at, int classes, bool binary, float (&z)[K]) {
  const T* from = static_cast<const T*>(logits.data) + at;
#pragma unroll
  for (int i = 0; i < K; ++i, from += logits.channel_stride)
    if (i < classes) z[i] = i == 0 && binary ? 0.0f : as_float(*from);
}

// Logits may be the least numbers there are, of classes that are left out: their exponents would be infinite, and no
// number between two source pixels. What is infinite itself stays so.
constexpr float kLeastExponent = -0x1p126f;

// The exponents to base 2 of a source pixel. A softmax does not change where all logits of a pixel lose the same: their
// largest, so that exponents are at most 0. Returns the least, or NaN.
template <int K>
__device__ float exponents_of(
    const CellBlock& block, int classes, int64_t row, int64_t column, float (&exponents)[K]) {
  const View& logits = block.call.logits;
  const bool binary = block.call.options.binary;  // its first class has no channel, and the logit 0
  const int64_t at = offset_of(logits, block.image, binary ? -1 : 0, row, column);
  switch (logits.dtype) {
    case DType::kFloat16: read_logits<__half>(logits, at, classes, binary, exponents); break;
    case DType::kBFloat16: read_logits<__nv_bfloat16>(logits, at, classes, binary, exponents); break;
    default: read_logits<float>(logits, at, classes, binary, exponents);
  }
  float most = -kInfinity;
#pragma unroll
  for (int i = 0; i < K; ++i)
    if (i < classes) most = fmaxf(most, exponents[i]);
  const float shift = kLog2E * most;
  float least = 0;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (i >= classes) continue;
    const bool is_infinite = exponents[i] == -kInfinity;
    exponents[i] = exponent(exponents[i], shift);
    if (exponents[i] < kLeastExponent && !is_infinite) exponents[i] = kLeastExponent;
    least = least_of(least, exponents[i]);
  }
  return least;
}

// Writes the exponents of a node of a row of cells to `at(class)` and `down(class)`: at the upper source row, and on to
// the lower one. Returns the least, or NaN.
template <int K, typename At, typename Down>
__device__ float read_node(const CellBlock& block, int classes, int below, int node, const At& at, const Down& down) {
  const int64_t column = smaller_of<int64_t>(block.first_cell + node, block.call.logits.width - 1);
  float exponents[K];
  const float least = exponents_of<K>(block, classes, block.row + below, column, exponents);
#pragma unroll
  for (int i = 0; i < K; ++i)
    if (i < classes) at(i) = exponents[i];
  const float lower = exponents_of<K>(block, classes, block.lower_row(below), column, exponents);
#pragma unroll
  for (int i = 0; i < K; ++i)
    if (i < classes) down(i) = exponents[i] - at(i);
  return least_of(least, lower);
}

// Exponents of a class in a column, from those of nodes: at the upper source row, and at the lower one.
__device__ inline float2 line_of(const float2* nodes, const Across::Column& column) {
  const float2 left = nodes[column.node], right = nodes[column.node + column.has_right];
  return make_float2(fmaf(column.weight, right.x - left.x, left.x), fmaf(column.weight, right.y - left.y, left.y));
}

// float2 of a column lie next to each other, with a gap after 16, so that cells of 8 columns meet different banks.
__host__ __device__ constexpr int slot_of(int column) { return column + column / 16; }

// Adds a block's gradient by columns from `first_x` on, [classes, slot_of(kHeld)], the sum over the rows and the part of
// the lower source row, to the nodes above and below: of a class always the same warp does, of a cell the same lane.
template <int K, int kHeld>
__device__ void fold_columns(
    const float2* gradient, int classes, float* to_upper, float* to_lower, const int* edges, const float* weights_x,
    int first_x, bool first) {
  constexpr int kOfWarp = (K + kWarps - 1) / kWarps, kSlots = slot_of(kHeld);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = max(edges[lane] - first_x, 0), end = min(edges[lane + 1] - first_x, kHeld);
  float sum[kOfWarp] = {}, below[kOfWarp] = {}, right[kOfWarp] = {}, below_right[kOfWarp] = {};
  for (int column = begin; column < end; ++column) {
    const float weight = weights_x[slot_of(column)];
    const float2* const from = gradient + warp * kSlots + slot_of(column);
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      if (warp + i * kWarps >= classes) continue;
      const float2 value = from[i * kWarps * kSlots];
      sum[i] += value.x, right[i] = fmaf(weight, value.x, right[i]);
      below[i] += value.y, below_right[i] = fmaf(weight, value.y, below_right[i]);
    }
  }
  const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  const int64_t at = (block * classes + warp) * kNodes + lane;
  float *const upper = to_upper + at, *const lower = to_lower + at;
#pragma unroll
  for (int i = 0; i < kOfWarp; ++i) {
    if (warp + i * kWarps >= classes) continue;
    const float right_upper = right[i] - below_right[i], right_lower = below_right[i];
    const float left_upper = (sum[i] - below[i]) - right_upper, left_lower = below[i] - right_lower;
    const float from_left_upper = __shfl_up_sync(kFullWarp, right_upper, 1);
    const float from_left_lower = __shfl_up_sync(kFullWarp, right_lower, 1);
    const auto add = [&](int64_t node, float above, float under) {
      upper[node] = (first ? 0.0f : upper[node]) + above, lower[node] = (first ? 0.0f : lower[node]) + under;
    };
    const int64_t held = static_cast<int64_t>(i) * kWarps * kNodes;
    add(held, left_upper + (lane > 0 ? from_left_upper : 0.0f), left_lower + (lane > 0 ? from_left_lower : 0.0f));
    if (lane == 31) add(held + 1, right_upper, right_lower);
  }
}

}  // namespace
}  // namespace bcmfnet
