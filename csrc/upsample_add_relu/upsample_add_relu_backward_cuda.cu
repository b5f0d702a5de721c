// A block has the gradient of some columns and channels of one row of `low`. Its threads sum the rows of the result that
// read this row, each at one column, to shared memory, a chunk of columns at a time; then each sums the columns that
// read its own. The rows between this source row and the next one are written as the gradient of `high` on the way, by
// the block of the upper one; they come from the second cache when the block of the lower one reads them again.
//
// No atomics: every sum is one thread's, in the order of rows and columns.
#include "common/cuda/element.h"
#include "common/cuda/grid.h"
#include "common/cuda/pack.h"
#include "upsample_add_relu/upsample_add_relu_cuda.h"

namespace bcmfnet {
namespace {

using Call = UpsampleAddReLUBackward;

constexpr int kThreads = 256;
constexpr int kSums = 4096;   // floats of a chunk: 16 KB
constexpr int kEach = 2;      // Each thread has so many of a block's columns and channels of `low`.
constexpr int64_t kMostBlocks = 65535;  // along the second and the third axis of a grid

template <bool kChannelsLast>
struct Block {
  static constexpr int kChannels = kChannelsLast ? 32 : 4;
  static constexpr int kColumns = kEach * kThreads / kChannels;  // of `low`
  static constexpr int kWide = kSums / kChannels;                // of the result, in a chunk
  // From a column of a chunk to the next, and from a channel: threads side by side write side by side.
  static constexpr int kColumnPitch = kChannelsLast ? kChannels : 1;
  static constexpr int kChannelPitch = kChannelsLast ? 1 : kWide + 1;  // another bank for each channel

  // Column and channel of `low` that are the k-th ones of a thread.
  __device__ static int column_of(int thread, int k) {
    const int i = thread + k * kThreads;
    return kChannelsLast ? i / kChannels : i % kColumns;
  }
  __device__ static int channel_of(int thread, int k) {
    const int i = thread + k * kThreads;
    return kChannelsLast ? i % kChannels : i / kColumns;
  }
};

// Sum of the rows that read a row of `low`, at one column: `cell` [2] are the rows before and after it.
template <typename T, int kCount>
__device__ void sum_rows(
    const Call& call, const Cell* cell, int64_t end, int64_t image, int64_t channel, int64_t x, bool writes,
    float (&sum)[kCount]) {
  using Packed = Pack<T, kCount>;
  const T* grad = static_cast<const T*>(call.grad.data) + offset_of(call.grad, image, channel, cell[0].begin, x);
  const T* out = static_cast<const T*>(call.out.data) + offset_of(call.out, image, channel, cell[0].begin, x);
  T* high = static_cast<T*>(call.high.data) + offset_of(call.high, image, channel, cell[1].begin, x);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int rows = static_cast<int>((half ? end : cell[1].begin) - cell[half].begin);
#pragma unroll 2
    for (int y = 0; y < rows; ++y, grad += call.grad.row_stride, out += call.out.row_stride) {
      Packed gradient = Packed::load(grad);
      const Packed result = Packed::load(out);
      const float upper = upper_weight(cell[half], y), weight = half ? 1 - upper : upper;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (as_float(result.value[i]) <= 0) store(&gradient.value[i], 0.0f);
        sum[i] = fmaf(weight, as_float(gradient.value[i]), sum[i]);
      }
      if (half && writes) gradient.store_to(high), high += call.high.row_stride;
    }
  }
}

template <typename T, int kCount, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 4) upsample_add_relu_backward_kernel(const Call call) {
  using Shape = Block<kChannelsLast>;
  constexpr int kChannels = Shape::kChannels, kColumns = Shape::kColumns;
  __shared__ float sums[kSums + (kChannelsLast ? 0 : kChannels)];
  __shared__ Cell rows[3], columns[kColumns + 2];  // from the one before on
  const int64_t image = blockIdx.x / static_cast<unsigned>(call.low.height);
  const int64_t row = blockIdx.x % static_cast<unsigned>(call.low.height);
  const int thread = static_cast<int>(threadIdx.x);
  const int tiles = static_cast<int>(ceil_div(call.low.channels, kChannels));
  if (thread < 3) rows[thread] = cell_of(row - 1 + thread, call.low.height, call.out.height);

  for (int tile = static_cast<int>(blockIdx.z); tile < tiles; tile += static_cast<int>(gridDim.z)) {
    const int64_t first_channel = static_cast<int64_t>(tile) * kChannels;
    const int channels = static_cast<int>(smaller_of<int64_t>(call.low.channels - first_channel, kChannels));
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kColumns;
    __syncthreads();  // the columns and sums of the tile before have been read
    for (int i = thread; i < kColumns + 2; i += kThreads)
      columns[i] = cell_of(first - 1 + i, call.low.width, call.out.width);
    __syncthreads();

    float own[kEach] = {};
    const int last = static_cast<int>(smaller_of<int64_t>(call.low.width - first, kColumns));
    const int64_t begin = columns[1].begin, end = columns[last + 1].begin;  // that the block writes
    for (int64_t chunk = columns[0].begin; chunk < end; chunk += Shape::kWide) {
      const int wide = static_cast<int>(smaller_of<int64_t>(end - chunk, Shape::kWide));
      constexpr int kGroups = kChannels / kCount;
      for (int i = thread; i < (kChannelsLast ? kGroups * wide : kGroups * Shape::kWide); i += kThreads) {
        const int x = kChannelsLast ? i / kGroups : i % Shape::kWide;
        const int c = (kChannelsLast ? i % kGroups : i / Shape::kWide) * kCount;
        if (x >= wide || c >= channels) continue;
        float sum[kCount] = {};
        sum_rows<T>(call, rows, rows[2].begin, image, first_channel + c, chunk + x, chunk + x >= begin, sum);
#pragma unroll
        for (int j = 0; j < kCount; ++j) sums[x * Shape::kColumnPitch + (c + j) * Shape::kChannelPitch] = sum[j];
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const int x = Shape::column_of(thread, k), c = Shape::channel_of(thread, k);
        if (x >= last || c >= channels) continue;
        const float* const from = sums + c * Shape::kChannelPitch;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Cell& cell = columns[x + half];
          const int64_t until = smaller_of<int64_t>(columns[x + half + 1].begin, chunk + wide);
          for (int64_t at = larger_of(cell.begin, chunk); at < until; ++at) {
            const float upper = upper_weight(cell, at - cell.begin), weight = half ? 1 - upper : upper;
            own[k] = fmaf(weight, from[(at - chunk) * Shape::kColumnPitch], own[k]);
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int x = Shape::column_of(thread, k), c = Shape::channel_of(thread, k);
      if (x >= last || c >= channels) continue;
      store(static_cast<T*>(call.low.data) + offset_of(call.low, image, first_channel + c, row, first + x), own[k]);
    }
  }
}

template <typename T, int kCount, bool kChannelsLast>
void launch(const Call& call, void* stream) {
  using Shape = Block<kChannelsLast>;
  const unsigned rows = static_cast<unsigned>(call.low.batch * call.low.height);
  const int64_t tiles = ceil_div(call.low.channels, Shape::kChannels);
  const dim3 grid(rows, blocks_for(call.low.width, Shape::kColumns),
                  static_cast<unsigned>(smaller_of(tiles, kMostBlocks)));
  BCM_LAUNCH((upsample_add_relu_backward_kernel<T, kCount, kChannelsLast>), grid, kThreads, 0, stream, call);
}

template <typename T>
void launch(const Call& call, void* stream) {
  constexpr int kCount = kPackBytes / sizeof(T);
  if (call.out.channels % kCount == 0 && has_packs(call.grad, kCount) && has_packs(call.out, kCount) &&
      has_packs(call.high, kCount)) {
    launch<T, kCount, true>(call, stream);
  } else if (is_channels_last(call)) {
    launch<T, 1, true>(call, stream);
  } else {
    launch<T, 1, false>(call, stream);
  }
}

}  // namespace
}  // namespace bcmfnet

extern "C" int upsample_add_relu_backward_cuda(const bcmfnet::UpsampleAddReLUBackward* call, void* stream) {
  using namespace bcmfnet;
  dispatch_float(call->out.dtype, [&](auto zero) { launch<decltype(zero)>(*call, stream); });
  return cudaGetLastError();
}
