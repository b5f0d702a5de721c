// A block writes kColumns output columns of one row of cells. Its threads first find, in pairs of cell and class, which
// classes can win in which cell; then each thread takes one column and evaluates the union of its warp's sets for
// several output rows at once, in registers: a class costs its corners once, and the warp does not diverge.
//
// Why the sets: at 19 classes and 1024x2048 a plain loop needs an FMA, a comparison and two selects for each of 40
// million scores, and the last three run at half rate: 8 us of arithmetic on 132 multiprocessors at 1.75 GHz, before
// anything is read or written. Most cells of a trained network's logits are left with one class or two.
#include "common/bilinear.h"
#include "common/cuda/element.h"
#include "common/cuda/grid.h"
#include "upsample_argmax/upsample_argmax_cuda.h"
#include "upsample_argmax/upsample_argmax_math.h"

namespace bcmfnet {
namespace {

constexpr int kColumns = 256;  // threads of a block
constexpr int kRows = 8;       // A thread holds so many output rows: all of a cell at the network's scale.
constexpr int kGroup = 32;     // The sets of so many classes are found at a time: one word for each cell.

// The four source pixels of a cell in one class.
struct Corners {
  float a, b, c, d;

  __device__ float smallest() const { return fminf(fminf(a, b), fminf(c, d)); }
  __device__ float largest() const { return fmaxf(fmaxf(a, b), fmaxf(c, d)); }
  __device__ bool has_nan() const { return isnan(a + b + c + d); }
};

template <typename T>
struct Reader {
  const UpsampleArgmax& call;
  const T *top, *bottom;  // the two source rows of the block's cells

  __device__ Reader(const UpsampleArgmax& call, int64_t image, int64_t row) : call(call) {
    top = static_cast<const T*>(call.logits.data) + offset_of(call.logits, image, 0, row);
    bottom = top + (high_of(row, call.logits.height, call.out_height) - row) * call.logits.row_stride;
  }

  __device__ Corners operator()(int c, int64_t cell) const {
    const int64_t left = c * call.logits.channel_stride + cell * call.logits.column_stride;
    const int64_t right = left + (high_of(cell, call.logits.width, call.out_width) - cell) * call.logits.column_stride;
    return {read(top + left), read(top + right), read(bottom + left), read(bottom + right)};
  }

  __device__ static float read(const T* from) { return finite(as_float(*from)); }
};

// The pairs of a cell and a class that one thread looks at: every kColumns-th of cells * classes.
struct Pairs {
  int cells, cell, c;

  __device__ explicit Pairs(int cells) : cells(cells), cell(threadIdx.x % cells), c(threadIdx.x / cells) {}
  __device__ void advance(int cell_step, int class_step) {
    cell += cell_step;
    c += class_step;
    if (cell >= cells) cell -= cells, ++c;
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

// An integer that is ordered as the float is, for atomicMax.
__device__ int ordered(float value) {
  const int bits = __float_as_int(value);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

template <typename T, typename Label, bool kConfidence>
__global__ void __launch_bounds__(kColumns, 3) upsample_argmax_kernel(const UpsampleArgmax call) {
  __shared__ int bound[kColumns];     // of a cell: the largest of its classes' smallest corners, as ordered()
  __shared__ unsigned set[kColumns];  // of a cell: the classes of a group that can win there, one bit each
  __shared__ float weight[kRows];     // of the lower source row in an output row
  __shared__ int64_t begin_y, end_y, first_cell, last_cell;

  const int64_t image = blockIdx.x / static_cast<unsigned>(call.logits.height);
  const int64_t row = blockIdx.x % static_cast<unsigned>(call.logits.height);
  const int64_t first_x = static_cast<int64_t>(blockIdx.y) * kColumns;
  const int64_t last_x = smaller_of<int64_t>(first_x + kColumns, call.out_width) - 1;
  const bool writes = first_x + threadIdx.x <= last_x;

  // A division of 64-bit integers costs dozens of instructions: each of these is made by one warp.
  if (threadIdx.x == 0) begin_y = first_output(row, call.logits.height, call.out_height);
  if (threadIdx.x == 32) end_y = first_output(row + 1, call.logits.height, call.out_height);
  if (threadIdx.x == 64) first_cell = source_of(first_x, call.logits.width, call.out_width).low;
  if (threadIdx.x == 96) last_cell = source_of(last_x, call.logits.width, call.out_width).low;
  bound[threadIdx.x] = ordered(-kInfinity);
  __syncthreads();

  const Reader<T> read(call, image, row);
  const int cells = static_cast<int>(last_cell - first_cell) + 1, classes = static_cast<int>(call.logits.channels);
  const int cell_step = kColumns % cells, class_step = kColumns / cells;
  for (Pairs pair(cells); pair.c < classes; pair.advance(cell_step, class_step))
    atomicMax(&bound[pair.cell], ordered(read(pair.c, first_cell + pair.cell).smallest()));

  const Source column = source_of(writes ? first_x + threadIdx.x : last_x, call.logits.width, call.out_width);
  for (int64_t y = begin_y; y < end_y; y += kRows) {
    const int rows = static_cast<int>(smaller_of<int64_t>(kRows, end_y - y));
    float best[kRows];
    int label[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) best[r] = -2 * kInfinity, label[r] = 0;
    for (int group = 0; group < classes; group += kGroup) {
      __syncthreads();  // the bounds are complete; the sets and weights of the round before have been read
      set[threadIdx.x] = 0;
      if (threadIdx.x < kRows)  // those beyond `rows` too: they are read, though nothing of them is written
        weight[threadIdx.x] = lerp_weight(y + threadIdx.x, row, call.logits.height, call.out_height);
      __syncthreads();
      const int members_end = group + kGroup < classes ? kGroup : classes - group;
      for (Pairs pair(cells); pair.c < members_end; pair.advance(cell_step, class_step)) {
        const Corners corners = read(group + pair.c, first_cell + pair.cell);
        const bool can_win = ordered(corners.largest()) >= bound[pair.cell] || corners.has_nan();
        if (can_win) atomicOr(&set[pair.cell], 1u << pair.c);
      }
      __syncthreads();
      unsigned members = __reduce_or_sync(kFullWarp, set[column.low - first_cell]);
      for (; members != 0; members &= members - 1) {
        const int c = group + __ffs(members) - 1;
        const Slope score(read(c, column.low), column.weight);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float value = score(weight[r]);
          const bool takes = beats(value, best[r]);
          best[r] = takes ? value : best[r];
          label[r] = takes ? c : label[r];
        }
      }
    }
    float sum[kRows] = {};
    for (int c = 0; kConfidence && c < classes; ++c) {
      const Slope score(read(c, column.low), column.weight);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] += __expf(score(weight[r]) - best[r]);
    }
    const int64_t at = (image * call.out_height + y) * call.out_width + first_x + threadIdx.x;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!writes || r >= rows) break;
      static_cast<Label*>(call.labels)[at + r * call.out_width] = static_cast<Label>(label[r]);
      if (kConfidence)
        reinterpret_cast<__half*>(call.confidence)[at + r * call.out_width] = __float2half_rn(1 / sum[r]);
    }
  }
}

template <typename T, typename Label>
void launch(const UpsampleArgmax& call, void* stream) {
  const dim3 grid(static_cast<unsigned>(call.logits.batch * call.logits.height),
                  blocks_for(call.out_width, kColumns));
  if (call.confidence != nullptr) {
    BCM_LAUNCH((upsample_argmax_kernel<T, Label, true>), grid, kColumns, 0, stream, call);
  } else {
    BCM_LAUNCH((upsample_argmax_kernel<T, Label, false>), grid, kColumns, 0, stream, call);
  }
}

template <typename T>
void launch(const UpsampleArgmax& call, void* stream) {
  if (call.wide) {
    launch<T, int16_t>(call, stream);
  } else {
    launch<T, uint8_t>(call, stream);
  }
}

}  // namespace
}  // namespace bcmfnet

extern "C" int upsample_argmax_cuda(const bcmfnet::UpsampleArgmax* call, void* stream) {
  using namespace bcmfnet;
  dispatch_float(call->logits.dtype, [&](auto zero) { launch<decltype(zero)>(*call, stream); });
  return cudaGetLastError();
}
