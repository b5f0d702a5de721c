// A thread writes the output rows between two source rows, at one column and in one channel, or in those that fill 16
// bytes: the four source pixels are read once for all of these rows. Neighbouring threads take neighbours in memory.
//
// Bound by memory: 1x64x128x256 in 16 bits is 4 MiB read and 4 MiB written, 2 us at an H200's 4.8 TB/s.
#include "common/bilinear.h"
#include "common/cuda/element.h"
#include "common/cuda/grid.h"
#include "common/cuda/pack.h"
#include "upsample_add_relu/upsample_add_relu_cuda.h"

namespace bcmfnet {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;  // A block has at most so many threads along the innermost axis.
constexpr int kRows = 4;    // A thread reads so many rows before it writes the first of them.
constexpr int64_t kMostBlocks = 65535;  // along the second and the third axis of a grid

// The channels [channel, channel + kCount) between two source columns, of one source row.
template <typename T, int kCount>
__device__ void read(
    const UpsampleAddReLU& call, int64_t offset, int64_t to_right, float weight, float (&values)[kCount]) {
  const T* from = static_cast<const T*>(call.low.data) + offset;
  const auto left = Pack<T, kCount>::load(from), right = Pack<T, kCount>::load(from + to_right);
  const bool wider = call.low.width < call.high.width;  // an axis that keeps its size is copied
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float a = as_float(left.value[i]), b = as_float(right.value[i]);
    values[i] = wider ? fmaf(weight, b - a, a) : a;
  }
}

// Output rows [begin, end), whose upper source row is `row`.
template <typename T, int kCount>
__device__ void write_rows(
    const UpsampleAddReLU& call, int64_t image, int64_t channel, int64_t row, int64_t x, int64_t begin, int64_t end) {
  using Packed = Pack<T, kCount>;
  const bool taller = call.low.height < call.high.height;
  const Source column = source_of(x, call.low.width, call.high.width);
  const int64_t first = offset_of(call.low, image, channel, row, column.low);
  const int64_t to_right = (column.high - column.low) * call.low.column_stride;
  const int64_t to_lower = (high_of(row, call.low.height, call.high.height) - row) * call.low.row_stride;
  float upper[kCount], step[kCount];
  read<T>(call, first, to_right, column.weight, upper);
  read<T>(call, first + to_lower, to_right, column.weight, step);
#pragma unroll
  for (int i = 0; i < kCount; ++i) step[i] = taller ? step[i] - upper[i] : 0;

  const T* high = static_cast<const T*>(call.high.data) + offset_of(call.high, image, channel, begin, x);
  T* out = static_cast<T*>(call.out.data) + offset_of(call.out, image, channel, begin, x);
  for (int64_t y = begin; y < end; y += kRows) {
    Packed packs[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (y + r < end) packs[r] = Packed::load(high + (y + r - begin) * call.high.row_stride);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (y + r >= end) break;
      const float weight = lerp_weight(y + r, row, call.low.height, call.high.height);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float sum = as_float(packs[r].value[i]) + fmaf(weight, step[i], upper[i]);
        store(&packs[r].value[i], sum < 0 ? 0 : sum);  // keeps NaN
      }
      packs[r].store_to(out + (y + r - begin) * call.out.row_stride);
    }
  }
}

// Threads run along channels first if kChannelsLast, else along columns.
template <typename T, int kCount, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) upsample_add_relu_kernel(const UpsampleAddReLU call) {
  __shared__ int64_t begin, end;
  const int64_t image = blockIdx.x / static_cast<unsigned>(call.low.height);
  const int64_t row = blockIdx.x % static_cast<unsigned>(call.low.height);
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  // A division of 64-bit integers costs dozens of instructions: each of these is made by one warp.
  if (thread == 0) begin = first_output(row, call.low.height, call.high.height);
  if (thread == 32) end = first_output(row + 1, call.low.height, call.high.height);
  __syncthreads();

  const int64_t inner = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  const int64_t outer = static_cast<int64_t>(blockIdx.z) * blockDim.y + threadIdx.y;
  const int64_t inner_step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  const int64_t outer_step = static_cast<int64_t>(gridDim.z) * blockDim.y;
  const int64_t inner_end = kChannelsLast ? call.high.channels / kCount : call.high.width;
  const int64_t outer_end = kChannelsLast ? call.high.width : call.high.channels;
  for (int64_t j = outer; j < outer_end; j += outer_step)
    for (int64_t i = inner; i < inner_end; i += inner_step)
      write_rows<T, kCount>(call, image, kChannelsLast ? i * kCount : j, row, kChannelsLast ? j : i, begin, end);
}

unsigned blocks(int64_t count, unsigned threads) {
  return static_cast<unsigned>(smaller_of(ceil_div(count, threads), kMostBlocks));
}

template <typename T, int kCount, bool kChannelsLast>
void launch(const UpsampleAddReLU& call, void* stream) {
  const int64_t inner = kChannelsLast ? call.high.channels / kCount : call.high.width;
  const int64_t outer = kChannelsLast ? call.high.width : call.high.channels;
  unsigned lanes = 1;
  while (lanes < kLanes && lanes < inner) lanes *= 2;
  const dim3 block(lanes, kThreads / lanes);
  const unsigned rows = static_cast<unsigned>(call.low.batch * call.low.height);
  const dim3 grid(rows, blocks(inner, block.x), blocks(outer, block.y));
  BCM_LAUNCH((upsample_add_relu_kernel<T, kCount, kChannelsLast>), grid, block, 0, stream, call);
}

template <typename T>
void launch(const UpsampleAddReLU& call, void* stream) {
  constexpr int kCount = kPackBytes / sizeof(T);
  if (call.high.channels % kCount == 0 && has_packs(call.low, kCount) && has_packs(call.high, kCount) &&
      has_packs(call.out, kCount)) {
    launch<T, kCount, true>(call, stream);
  } else if (is_channels_last(call)) {
    launch<T, 1, true>(call, stream);
  } else {
    launch<T, 1, false>(call, stream);
  }
}

}  // namespace
}  // namespace bcmfnet

extern "C" int upsample_add_relu_cuda(const bcmfnet::UpsampleAddReLU* call, void* stream) {
  using namespace bcmfnet;
  dispatch_float(call->high.dtype, [&](auto zero) { launch<decltype(zero)>(*call, stream); });
  return cudaGetLastError();
}
