// A block writes kColumns output columns of kCellRows rows of cells. It reads both source rows of a row of cells once
// into shared memory; eight lanes find which classes can win in a cell; then each thread takes a column and evaluates its
// cell's set for several output rows at once, in registers: a class costs its corners once. A set of one class needs no
// arithmetic at all.
//
// Why the sets: at 19 classes and 1024x2048 a plain loop needs an FMA, a comparison and two selects for each of 40
// million scores, and the last three run at half rate: 8 us of arithmetic on 132 multiprocessors at 1.75 GHz, before
// anything is read or written. Most cells of a trained network's logits are left with one class or two.
#include "common/bilinear.h"
#include "common/cuda/divisor.h"
#include "common/cuda/element.h"
#include "common/cuda/grid.h"
#include "upsample_argmax/upsample_argmax_cuda.h"
#include "upsample_argmax/upsample_argmax_math.h"

namespace bcmfnet {
namespace {

constexpr int kColumns = 256;  // threads of a block
constexpr int kRows = 8;       // A thread holds so many output rows: all of a cell at the network's scale.
constexpr int kCellRows = 2;   // More leave an H200 less than four blocks for each multiprocessor there.
constexpr int kGroup = 32;     // The sets of so many classes are found at a time: one word for each cell.
constexpr int kLanes = 8;      // that share a cell's classes

// A call, and what a block needs beside it.
struct Plan {
  UpsampleArgmax call;
  int height, width, classes;  // of the logits
  int out_height, out_width;
  int pitch;       // source columns that a block holds at most
  Divisor strips;  // by the blocks of an image along its rows
  int right;       // from a source column to the one that is interpolated with it: 0 where the width is kept
};

// The four source pixels of a cell in one class.
struct Corners {
  float a, b, c, d;

  __device__ float smallest() const { return fminf(fminf(a, b), fminf(c, d)); }
  __device__ float largest() const { return fmaxf(fmaxf(a, b), fmaxf(c, d)); }
  __device__ bool has_nan() const { return isnan(a + b + c + d); }
};

// The scores of a class at one source column, in the two source rows of a row of cells.
struct alignas(8) Scores {
  float top, bottom;
};

// Source columns [first, first + columns) of a row of cells in shared memory, a group of classes at a time.
template <typename T>
struct Reader {
  const Plan& plan;
  Scores* const scores;  // [kGroup, pitch]
  const int first, columns;
  const int first_class, class_step;  // of a thread, which takes every kColumns-th of classes * columns
  const int first_column, column_step;
  const T *top, *bottom;

  __device__ Reader(const Plan& plan, Scores* scores, int first, int columns)
      : plan(plan), scores(scores), first(first), columns(columns),
        first_class(static_cast<int>(threadIdx.x) / columns), class_step(kColumns / columns),
        first_column(static_cast<int>(threadIdx.x) - first_class * columns),
        column_step(kColumns - class_step * columns) {}

  __device__ void go_to(int64_t image, int row) {
    const View& logits = plan.call.logits;
    top = static_cast<const T*>(logits.data) + offset_of(logits, image, 0, row);
    bottom = top + (high_of(row, plan.height, plan.out_height) - row) * logits.row_stride;
  }

  // Classes [begin, end). What was there has been read after the first barrier, what comes is there after the second.
  __device__ void load(int begin, int end) const {
    int column = first_column, c = begin + first_class;
    __syncthreads();
    while (c < end) {
      const int64_t at = c * plan.call.logits.channel_stride +
                         smaller_of(first + column, plan.width - 1) * plan.call.logits.column_stride;
      scores[(c - begin) * plan.pitch + column] = {finite(as_float(top[at])), finite(as_float(bottom[at]))};
      column += column_step, c += class_step;
      if (column >= columns) column -= columns, ++c;
    }
    __syncthreads();
  }

  // Of a class of the group, and a cell.
  __device__ Corners operator()(int c, int cell) const {
    const Scores* left = scores + c * plan.pitch + cell;
    const Scores a = *left, b = left[plan.right];
    return {a.top, b.top, a.bottom, b.bottom};
  }
};

// Score of a column in the upper source row, and the step to the lower one.
struct Slope {
  float score, step;

  __device__ Slope(const Corners& corners, float weight) {
    score = fmaf(weight, corners.b - corners.a, corners.a);
    step = fmaf(weight, corners.d - corners.c, corners.c) - score;
  }
  __device__ float operator()(float weight) const { return fmaf(weight, step, score); }
};

// The largest of the classes' smallest corners, of each cell: a class that stays below it in all corners cannot win.
template <typename T>
__device__ void find_bounds(const Reader<T>& read, int cells, int classes, bool first, float* bound) {
  for (int cell = threadIdx.x / kLanes; cell < cells; cell += kColumns / kLanes) {
    float largest = first ? -kInfinity : bound[cell];
    for (int c = threadIdx.x % kLanes; c < classes; c += kLanes) largest = fmaxf(largest, read(c, cell).smallest());
    const unsigned lanes = 0xffu << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, lane));
    if (threadIdx.x % kLanes == 0) bound[cell] = largest;
    __syncwarp(lanes);  // the same lanes read it
  }
}

// The classes of the group that can win in each cell, one bit each.
template <typename T>
__device__ void find_sets(const Reader<T>& read, int cells, int classes, const float* bound, unsigned* set) {
  for (int cell = threadIdx.x / kLanes; cell < cells; cell += kColumns / kLanes) {
    unsigned members = 0;
    for (int c = threadIdx.x % kLanes; c < classes; c += kLanes) {
      const Corners corners = read(c, cell);
      if (corners.largest() >= bound[cell] || corners.has_nan()) members |= 1u << c;
    }
    const unsigned lanes = 0xffu << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) members |= __shfl_xor_sync(lanes, members, lane);
    if (threadIdx.x % kLanes == 0) set[cell] = members;
  }
}

template <typename T, typename Label, bool kConfidence>
__global__ void __launch_bounds__(kColumns, kConfidence ? 2 : 4)
upsample_argmax_kernel(const __grid_constant__ Plan plan) {
  BCM_DYNAMIC_SHARED(Scores, scores);  // then of each cell the bound, and the set
  float* const bound = reinterpret_cast<float*>(scores + smaller_of(plan.classes, kGroup) * plan.pitch);
  unsigned* const set = reinterpret_cast<unsigned*>(bound + plan.pitch);
  __shared__ float weight[kRows];  // of the lower source row in an output row
  __shared__ int begin_y[kCellRows + 1], first_cell, last_cell;

  const UpsampleArgmax& call = plan.call;
  const int image = plan.strips.quotient(static_cast<int>(blockIdx.x));
  const int first_row = plan.strips.remainder(static_cast<int>(blockIdx.x), image) * kCellRows;
  const int cell_rows = smaller_of(kCellRows, plan.height - first_row);
  const int first_x = static_cast<int>(blockIdx.y) * kColumns;
  const int last_x = smaller_of(first_x + kColumns, plan.out_width) - 1;
  const int x = first_x + static_cast<int>(threadIdx.x);
  const bool writes = x <= last_x;

  const Source column = source_of(writes ? x : last_x, plan.width, plan.out_width);
  if (threadIdx.x == 0) first_cell = static_cast<int>(column.low);
  if (x == last_x) last_cell = static_cast<int>(column.low);
  if (threadIdx.x <= kCellRows)
    begin_y[threadIdx.x] = static_cast<int>(first_output(first_row + threadIdx.x, plan.height, plan.out_height));
  __syncthreads();
  const int cells = last_cell - first_cell + 1, cell = static_cast<int>(column.low) - first_cell;
  Reader<T> read(plan, scores, first_cell, cells + plan.right);
  const int groups = (plan.classes + kGroup - 1) / kGroup;
  const auto members_of = [&](int group) { return smaller_of(plan.classes - group * kGroup, kGroup); };
  const auto load = [&](int group) { read.load(group * kGroup, group * kGroup + members_of(group)); };

  for (int k = 0; k < cell_rows; ++k) {
    read.go_to(image, first_row + k);
    for (int group = 0; group < groups; ++group) {
      load(group);
      find_bounds(read, cells, members_of(group), group == 0, bound);
    }
    for (int y = begin_y[k]; y < begin_y[k + 1]; y += kRows) {
      float best[kRows];
      int label[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) best[r] = -2 * kInfinity, label[r] = 0;
      for (int group = 0; group < groups; ++group) {
        if (groups > 1) {
          load(group);
        } else if (y > begin_y[k]) {
          __syncthreads();  // the weights and sets before have been read
        }
        if (group == 0 && threadIdx.x < kRows)  // those beyond the cell too: they are read, and nothing of them written
          weight[threadIdx.x] = lerp_weight(y + threadIdx.x, first_row + k, plan.height, plan.out_height);
        find_sets(read, cells, members_of(group), bound, set);
        __syncthreads();
        unsigned members = set[cell];
        if (!kConfidence && groups == 1 && (members & (members - 1)) == 0) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) label[r] = __ffs(static_cast<int>(members)) - 1;
          members = 0;
        }
        for (; members != 0; members &= members - 1) {
          const int c = __ffs(static_cast<int>(members)) - 1;
          const Slope score(read(c, cell), column.weight);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float value = score(weight[r]);
            const bool takes = beats(value, best[r]);
            best[r] = takes ? value : best[r];
            label[r] = takes ? group * kGroup + c : label[r];
          }
        }
      }
      float sum[kRows] = {};
      for (int group = 0; kConfidence && group < groups; ++group) {
        if (groups > 1) load(group);
        for (int c = 0; c < members_of(group); ++c) {
          const Slope score(read(c, cell), column.weight);
#pragma unroll
          for (int r = 0; r < kRows; ++r) sum[r] += __expf(score(weight[r]) - best[r]);
        }
      }
      const int rows = begin_y[k + 1] - y;
      const int64_t at = (static_cast<int64_t>(image) * plan.out_height + y) * plan.out_width + x;
      Label* to = static_cast<Label*>(call.labels) + at;
      __half* confidence = reinterpret_cast<__half*>(call.confidence) + at;
#pragma unroll
      for (int r = 0; r < kRows; ++r, to += plan.out_width, confidence += plan.out_width) {
        if (!writes || r >= rows) break;
        *to = static_cast<Label>(label[r]);
        if (kConfidence) *confidence = __float2half_rn(1 / sum[r]);
      }
    }
  }
}

template <typename T, typename Label>
int launch(const UpsampleArgmax& call, void* stream) {
  const View& logits = call.logits;
  const int64_t strips = ceil_div(logits.height, kCellRows);
  Plan plan{};
  plan.call = call, plan.strips = Divisor(strips), plan.right = logits.width < call.out_width;
  plan.height = static_cast<int>(logits.height), plan.width = static_cast<int>(logits.width);
  plan.classes = static_cast<int>(logits.channels);
  plan.out_height = static_cast<int>(call.out_height), plan.out_width = static_cast<int>(call.out_width);
  // Cells of kColumns output columns, and the source column after them.
  plan.pitch = static_cast<int>(smaller_of((kColumns - 1) * logits.width / call.out_width + 3, logits.width + 1));
  const int64_t bytes = plan.pitch * (smaller_of(plan.classes, kGroup) * sizeof(Scores) + 8);
  const dim3 grid(static_cast<unsigned>(logits.batch * strips), blocks_for(call.out_width, kColumns));
  const auto kernel =
      call.confidence != nullptr ? upsample_argmax_kernel<T, Label, true> : upsample_argmax_kernel<T, Label, false>;
  return launch_with_shared(kernel, grid, kColumns, bytes, stream, plan);
}

template <typename T>
int launch(const UpsampleArgmax& call, void* stream) {
  return call.wide ? launch<T, int16_t>(call, stream) : launch<T, uint8_t>(call, stream);
}

}  // namespace
}  // namespace bcmfnet

extern "C" int upsample_argmax_cuda(const bcmfnet::UpsampleArgmax* call, void* stream) {
  using namespace bcmfnet;
  return dispatch_float(call->logits.dtype, [&](auto zero) { return launch<decltype(zero)>(*call, stream); });
}
