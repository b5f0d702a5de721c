// A block holds some channels of one image in shared memory: x is read once, and so is its gradient written. Windows
// are sums over columns, then over rows; the gradient is what reads a pixel, over rows, then over columns. A map of
// which not even one channel fits goes through the direct kernels, which read windows from global memory.
//
// Why separable: at 16x32 with windows of 5, 9 and 17 a channel costs about 5,100 additions of what lies in shared
// memory, which is the limit, instead of 8,600; so does its gradient.
#include "common/cuda/divisor.h"
#include "common/cuda/element.h"
#include "common/cuda/grid.h"
#include "common/cuda/pack.h"
#include "pyramid_pool/pyramid_pool_cuda.h"
#include "pyramid_pool/pyramid_pool_math.h"

namespace bcmfnet {
namespace {

constexpr int kThreads = 256;
constexpr int kMostChannels = 16;  // A block takes at most 32 bytes of a channels_last map in 16 bits: a sector.
constexpr int kPacked = 4;         // channels that are read at once where they lie side by side
constexpr int kBlocks = 128;       // So many are wanted at once: about one for each multiprocessor of an H200.

// The windows of one pooled map.
struct Windows {
  int height, width;  // of the pooled map
  int stride, padding;
  int position;  // number of the first window among those of all maps
  int column;    // number of the first window's column among the columns of all maps
  float area;    // by which a sum is divided; padding counts
  int64_t at;    // offset of the first window in the packed maps
  Divisor across, all;  // by their width, and by their number

  __device__ Range<int> covered(int window, int size) const { return covered_by(window, stride, padding, size); }
  __device__ Range<int> over(int position, int count) const { return covering(position, stride, padding, count); }
};

// A call in the integers of a block.
struct Plan {
  View map;
  int height, width;             // of the map
  int maps, columns;             // how many pooled maps there are, and columns of all of them
  int64_t positions;             // of all of them
  bool channels_last;            // of the packed maps
  int log_channels;              // channels of a block, to base 2
  int pitch, plane, sums_plane;  // of rows and channels in shared memory: odd, so that lanes meet other banks
  bool packs;                    // kPacked channels of the map from a multiple of it are read at once
  Divisor across, down, pixels;  // by the map's width, height and pixels
  Divisor each_image;            // by the blocks of an image
  Windows windows[kMaxMaps];

  int64_t groups() const { return (map.channels + (1 << log_channels) - 1) >> log_channels; }
  int64_t forward_bytes() const { return 4 * static_cast<int64_t>(plane + sums_plane) << log_channels; }
  int64_t backward_bytes() const { return 4 * ((positions | 1) + sums_plane) << log_channels; }
};

void add_windows(Plan& plan, int64_t height, int64_t width, int64_t stride, int64_t padding, float area) {
  const int64_t largest = larger_of(plan.height, plan.width);  // beyond it nothing changes
  int64_t at = 0;
  if (plan.maps > 0) {
    const Windows& last = plan.windows[plan.maps - 1];
    at = last.at + plan.map.batch * plan.map.channels * last.height * last.width;
  }
  plan.windows[plan.maps++] = {
      static_cast<int>(height), static_cast<int>(width), static_cast<int>(smaller_of(stride, largest)),
      static_cast<int>(smaller_of(padding, largest)), static_cast<int>(plan.positions), plan.columns, area, at,
      Divisor(width), Divisor(height * width)};
  plan.positions += height * width;
  plan.columns += static_cast<int>(width);
}

Plan plan_of(const PyramidPool& call) {
  const Pyramid& pyramid = call.pyramid;
  Plan plan{};
  plan.map = call.map;
  plan.height = static_cast<int>(pyramid.height), plan.width = static_cast<int>(pyramid.width);
  plan.channels_last = call.channels_last;
  for (int i = 0; i < pyramid.pools; ++i) {
    const Pool& pool = pyramid.pool[i];
    const float side = static_cast<float>(pool.kernel);
    add_windows(plan, pool.height, pool.width, pool.stride, pool.padding, side * side);
  }
  const int64_t pixels = pyramid.height * pyramid.width;
  add_windows(plan, 1, 1, 1, pyramid.height + pyramid.width, static_cast<float>(pixels));
  return plan;
}

// Lay out shared memory for as many channels of a block as leave enough blocks; `bytes` tells how much they take. False
// where not one channel fits.
bool fits(Plan& plan, int64_t (Plan::*bytes)() const) {
  const int64_t pixels = static_cast<int64_t>(plan.height) * (plan.width | 1);
  const int64_t sums = static_cast<int64_t>(plan.height) * plan.columns;
  if (pixels + sums + plan.positions > kMostShared / 4) return false;
  plan.pitch = plan.width | 1, plan.plane = static_cast<int>(pixels) | 1, plan.sums_plane = static_cast<int>(sums) | 1;
  if ((plan.*bytes)() > kMostShared) return false;
  do {
    ++plan.log_channels;
  } while (1 << plan.log_channels <= kMostChannels && (plan.*bytes)() <= kSharedUnasked &&
           plan.map.batch * plan.map.channels >> plan.log_channels >= kBlocks);
  --plan.log_channels;
  plan.packs = 1 << plan.log_channels >= kPacked && plan.map.channels % kPacked == 0 && has_packs(plan.map, kPacked);
  plan.across = Divisor(plan.width), plan.down = Divisor(plan.height), plan.pixels = Divisor(plan.height * plan.width);
  plan.each_image = Divisor(plan.groups());
  return true;
}

// The channels of a block, and how its threads share items of them.
struct Group {
  const Plan& plan;
  int64_t image, first;
  int channels;

  __device__ explicit Group(const Plan& plan) : plan(plan) {
    const int number = plan.each_image.quotient(static_cast<int>(blockIdx.x));
    image = number;
    first = static_cast<int64_t>(plan.each_image.remainder(static_cast<int>(blockIdx.x), number)) << plan.log_channels;
    const int64_t left = plan.map.channels - first;
    channels = left < 1 << plan.log_channels ? static_cast<int>(left) : 1 << plan.log_channels;
  }

  // Call `work(channel, position)` for each channel and position, side by side as they lie in global memory.
  template <typename Work>
  __device__ void each(bool channels_last, const Divisor& positions, Work work) const {
    const int mask = (1 << plan.log_channels) - 1;
#pragma unroll 4
    for (int i = threadIdx.x; i < static_cast<int>(positions.divisor) << plan.log_channels; i += kThreads) {
      const int quotient = channels_last ? i >> plan.log_channels : positions.quotient(i);
      const int remainder = channels_last ? i & mask : positions.remainder(i, quotient);
      const int channel = channels_last ? remainder : quotient;
      if (channel < channels) work(channel, channels_last ? quotient : remainder);
    }
  }

  // Call `work(channel, row, number)` for each row of the map and each of some windows' columns.
  template <typename Work>
  __device__ void each_column(const Windows& windows, Work work) const {
    for (int i = threadIdx.x; i < channels * plan.height * windows.width; i += kThreads) {
      const int rows = windows.across.quotient(i), channel = plan.down.quotient(rows);
      work(channel, plan.down.remainder(rows, channel), windows.across.remainder(i, rows));
    }
  }

  __device__ int64_t in_map(int channel, int y, int x) const {
    return offset_of(plan.map, image, first + channel, y, x);
  }
  __device__ int64_t in_packed(const Windows& windows, int channel, int position) const {
    const int64_t count = static_cast<int64_t>(windows.height) * windows.width;
    const int64_t row = plan.channels_last ? (image * count + position) * plan.map.channels + first + channel
                                           : (image * plan.map.channels + first + channel) * count + position;
    return windows.at + row;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) pool_kernel(const __grid_constant__ Plan plan, const T* x, T* packed) {
  BCM_DYNAMIC_SHARED(float, map);  // [channels, height, width], then sums over columns [channels, height, columns]
  float* const sums = map + (plan.plane << plan.log_channels);
  const Group group(plan);

  const auto place = [&](int position, int& y, int& column) {
    y = plan.across.quotient(position), column = plan.across.remainder(position, y);
  };
  if (plan.packs) {
    const int log_packs = plan.log_channels - 2, mask = (1 << log_packs) - 1;
    for (int i = threadIdx.x; i < plan.height * plan.width << log_packs; i += kThreads) {
      const int channel = (i & mask) * kPacked;
      if (channel >= group.channels) continue;
      int y, column;
      place(i >> log_packs, y, column);
      const auto pack = Pack<T, kPacked>::load(x + group.in_map(channel, y, column));
#pragma unroll
      for (int j = 0; j < kPacked; ++j)
        map[(channel + j) * plan.plane + y * plan.pitch + column] = as_float(pack.value[j]);
    }
  } else {
    group.each(plan.map.channel_stride == 1, plan.pixels, [&](int channel, int position) {
      int y, column;
      place(position, y, column);
      map[channel * plan.plane + y * plan.pitch + column] = as_float(x[group.in_map(channel, y, column)]);
    });
  }
  __syncthreads();

  for (int i = 0; i < plan.maps; ++i) {
    const Windows& windows = plan.windows[i];
    group.each_column(windows, [&](int channel, int y, int number) {
      const Range<int> columns = windows.covered(number, plan.width);
      const float* row = map + channel * plan.plane + y * plan.pitch;
      float sum = 0;
      for (int column = columns.begin; column < columns.end; ++column) sum += row[column];
      sums[channel * plan.sums_plane + y * plan.columns + windows.column + number] = sum;
    });
  }
  __syncthreads();

  for (int i = 0; i < plan.maps; ++i) {
    const Windows& windows = plan.windows[i];
    group.each(plan.channels_last, windows.all, [&](int channel, int position) {
      const int number = windows.across.quotient(position);
      const Range<int> rows = windows.covered(number, plan.height);
      const float* column =
          sums + channel * plan.sums_plane + windows.column + windows.across.remainder(position, number);
      float sum = 0;
      for (int y = rows.begin; y < rows.end; ++y) sum += column[y * plan.columns];
      store(packed + group.in_packed(windows, channel, position), sum / windows.area);
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
pool_backward_kernel(const __grid_constant__ Plan plan, const T* packed, T* gradient) {
  BCM_DYNAMIC_SHARED(float, weighted);  // [channels, positions], then sums over rows [channels, height, columns]
  const int weighted_plane = static_cast<int>(plan.positions) | 1;
  float* const sums = weighted + (weighted_plane << plan.log_channels);
  const Group group(plan);

  for (int i = 0; i < plan.maps; ++i) {
    const Windows& windows = plan.windows[i];
    group.each(plan.channels_last, windows.all, [&](int channel, int position) {
      const float value = as_float(packed[group.in_packed(windows, channel, position)]);
      weighted[channel * weighted_plane + windows.position + position] = value / windows.area;
    });
  }
  __syncthreads();

  for (int i = 0; i < plan.maps; ++i) {
    const Windows& windows = plan.windows[i];
    group.each_column(windows, [&](int channel, int y, int number) {
      const Range<int> rows = windows.over(y, windows.height);
      const float* column = weighted + channel * weighted_plane + windows.position + number;
      float sum = 0;
      for (int row = rows.begin; row < rows.end; ++row) sum += column[row * windows.width];
      sums[channel * plan.sums_plane + y * plan.columns + windows.column + number] = sum;
    });
  }
  __syncthreads();

  group.each(plan.map.channel_stride == 1, plan.pixels, [&](int channel, int position) {
    const int y = plan.across.quotient(position), x = plan.across.remainder(position, y);
    const float* row = sums + channel * plan.sums_plane + y * plan.columns;
    float sum = 0;
    for (int i = 0; i < plan.maps; ++i) {
      const Range<int> columns = plan.windows[i].over(x, plan.windows[i].width);
      for (int column = columns.begin; column < columns.end; ++column) sum += row[plan.windows[i].column + column];
    }
    store(gradient + group.in_map(channel, y, x), sum);
  });
}

// An image's channel and one of `count` positions, by the number of a thread, side by side as they lie in memory.
struct Item {
  int64_t image, channel, position;

  __device__ Item(int64_t i, int64_t channels, int64_t count, bool channels_last) {
    const int64_t rest = channels_last ? i / channels : i / count;
    channel = channels_last ? i % channels : rest % channels;
    position = channels_last ? rest % count : i % count;
    image = channels_last ? rest / count : rest / channels;
  }
};

__device__ int64_t thread_number() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

// The windows of one map but the global one, one for each thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
direct_kernel(const __grid_constant__ Plan plan, int number, const T* x, T* packed) {
  const Windows& windows = plan.windows[number];
  const int64_t count = static_cast<int64_t>(windows.height) * windows.width;
  if (thread_number() >= plan.map.batch * plan.map.channels * count) return;
  const Item item(thread_number(), plan.map.channels, count, plan.channels_last);
  const Range<int> rows = windows.covered(static_cast<int>(item.position / windows.width), plan.height);
  const Range<int> columns = windows.covered(static_cast<int>(item.position % windows.width), plan.width);
  const T* from = x + offset_of(plan.map, item.image, item.channel, 0);
  float sum = 0;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    float row = 0;
    for (int64_t column = columns.begin; column < columns.end; ++column)
      row += as_float(from[y * plan.map.row_stride + column * plan.map.column_stride]);
    sum += row;
  }
  store(packed + windows.at + thread_number(), sum / windows.area);
}

// The global average of one channel, or of 32 where they lie side by side.
template <typename T>
__global__ void __launch_bounds__(kThreads)
direct_mean_kernel(const __grid_constant__ Plan plan, const T* x, T* packed) {
  __shared__ float part[kThreads];
  const Windows& windows = plan.windows[plan.maps - 1];
  const unsigned lanes = plan.map.channel_stride == 1 ? 32 : 1;
  const unsigned groups = static_cast<unsigned>((plan.map.channels + lanes - 1) / lanes);
  const int64_t image = blockIdx.x / groups;
  const int64_t channel = static_cast<int64_t>(blockIdx.x % groups) * lanes + threadIdx.x % lanes;
  const T* from = x + offset_of(plan.map, image, channel, 0);
  float sum = 0;
  for (int64_t y = 0; y < plan.height && channel < plan.map.channels; ++y) {
    float row = 0;
    for (int64_t column = threadIdx.x / lanes; column < plan.width; column += kThreads / lanes)
      row += as_float(from[y * plan.map.row_stride + column * plan.map.column_stride]);
    sum += row;
  }
  part[threadIdx.x] = sum;
  for (unsigned width = kThreads / 2; width >= lanes; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) part[threadIdx.x] += part[threadIdx.x + width];
  }
  if (threadIdx.x < lanes && channel < plan.map.channels)
    store(packed + windows.at + image * plan.map.channels + channel, part[threadIdx.x] / windows.area);
}

// The gradient of one element for each thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
direct_backward_kernel(const __grid_constant__ Plan plan, const T* packed, T* gradient) {
  const int64_t pixels = static_cast<int64_t>(plan.height) * plan.width;
  if (thread_number() >= plan.map.batch * plan.map.channels * pixels) return;
  const Item item(thread_number(), plan.map.channels, pixels, plan.map.channel_stride == 1);
  const int64_t y = item.position / plan.width, x = item.position % plan.width;
  const int64_t step = plan.channels_last ? plan.map.channels : 1;
  float sum = 0;
  for (int i = 0; i < plan.maps; ++i) {
    const Windows& windows = plan.windows[i];
    const Range<int> rows = windows.over(static_cast<int>(y), windows.height);
    const Range<int> columns = windows.over(static_cast<int>(x), windows.width);
    const int64_t count = static_cast<int64_t>(windows.height) * windows.width;
    const T* from = packed + windows.at + item.image * plan.map.channels * count +
                    item.channel * (plan.channels_last ? 1 : count);
    float part = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t column = columns.begin; column < columns.end; ++column)
        part += as_float(from[(row * windows.width + column) * step]);
    sum += part / windows.area;
  }
  store(gradient + offset_of(plan.map, item.image, item.channel, y, x), sum);
}

template <typename T>
int forward(const PyramidPool& call, void* stream) {
  Plan plan = plan_of(call);
  const T* x = static_cast<const T*>(call.map.data);
  T* packed = static_cast<T*>(call.packed);
  const int64_t batch = plan.map.batch, channels = plan.map.channels;
  if (fits(plan, &Plan::forward_bytes)) {
    const unsigned blocks = static_cast<unsigned>(batch * plan.groups());
    return launch_with_shared(pool_kernel<T>, blocks, kThreads, plan.forward_bytes(), stream, plan, x, packed);
  }
  for (int i = 0; i < plan.maps - 1; ++i) {
    const unsigned blocks = blocks_for(batch * channels * plan.windows[i].height * plan.windows[i].width, kThreads);
    BCM_LAUNCH(direct_kernel<T>, blocks, kThreads, 0, stream, plan, i, x, packed);
  }
  const int64_t groups = plan.map.channel_stride == 1 ? ceil_div(channels, 32) : channels;
  BCM_LAUNCH(direct_mean_kernel<T>, static_cast<unsigned>(batch * groups), kThreads, 0, stream, plan, x, packed);
  return cudaGetLastError();
}

template <typename T>
int backward(const PyramidPool& call, void* stream) {
  Plan plan = plan_of(call);
  const T* packed = static_cast<const T*>(call.packed);
  T* gradient = static_cast<T*>(call.map.data);
  const int64_t batch = plan.map.batch;
  if (fits(plan, &Plan::backward_bytes)) {
    const unsigned blocks = static_cast<unsigned>(batch * plan.groups());
    return launch_with_shared(
        pool_backward_kernel<T>, blocks, kThreads, plan.backward_bytes(), stream, plan, packed, gradient);
  }
  const unsigned blocks = blocks_for(batch * plan.map.channels * plan.height * plan.width, kThreads);
  BCM_LAUNCH(direct_backward_kernel<T>, blocks, kThreads, 0, stream, plan, packed, gradient);
  return cudaGetLastError();
}

}  // namespace
}  // namespace bcmfnet

extern "C" int pyramid_pool_cuda(const bcmfnet::PyramidPool* call, void* stream) {
  using namespace bcmfnet;
  return dispatch_float(call->map.dtype, [&](auto zero) { return forward<decltype(zero)>(*call, stream); });
}

extern "C" int pyramid_pool_backward_cuda(const bcmfnet::PyramidPool* call, void* stream) {
  using namespace bcmfnet;
  return dispatch_float(call->map.dtype, [&](auto zero) { return backward<decltype(zero)>(*call, stream); });
}
