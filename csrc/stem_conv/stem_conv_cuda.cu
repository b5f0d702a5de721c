// A block normalises the pixels that its tile of the result reads, once, into shared memory, three values to a pixel as
// in a row of a frame. The nine values that an element reads of each row are then neighbours, and those of the next element
// lie six further on, so that pairs of them are whole words.
//
// 16-bit types multiply by tensor cores: 16 pixels by 32 channels a warp, of three rows by five pairs of taps. float32
// has eight pixels by four channels a lane.
//
// Bound by memory: a frame of 1024x2048 is 6.3 MB as bytes, 32 channels of the result 33.6 MB in 16 bits.
#include "common/cuda/divisor.h"
#include "common/cuda/element.h"
#include "common/cuda/grid.h"
#include "common/cuda/mma.h"
#include "common/cuda/pack.h"
#include "common/integers.h"
#include "stem_conv/stem_conv_cuda.h"

namespace bcmfnet {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kGroup = 32;  // channels that are computed at once
constexpr int kRows = 16;   // of the result, in a block
constexpr int kInRows = 2 * kRows + 1;
constexpr int kOfRow = 9;   // taps of a row of the image

template <typename T>
struct Tile {
  static constexpr int kColumns = sizeof(T) == 2 ? 64 : 32;
  static constexpr int kInColumns = 2 * kColumns + 1;
  static constexpr int kPitch = 3 * kInColumns + 1;  // from row to row
};

// Where a block's tile is in the result.
struct Place {
  const int64_t image;
  const int first_row, first_column;

  // `blocks` are those of an image on top of each other.
  __device__ Place(const Divisor& blocks, int columns)
      : image(blocks.quotient(blockIdx.x)), first_row(blocks.remainder(blockIdx.x, static_cast<int>(image)) * kRows),
        first_column(static_cast<int>(blockIdx.y) * columns) {}
};

// Normalises what a tile reads; around the image are zeros. A lane has a column, and after all others the last one.
template <typename In, typename T>
__device__ void read_tile_of(const StemConv& call, const Place& place, T* tile) {
  using Shape = Tile<T>;
  const View& images = call.images;
  const int height = static_cast<int>(images.height), width = static_cast<int>(images.width);
  const int first_row = 2 * place.first_row - 1, first_column = 2 * place.first_column - 1;
  const In* const image = static_cast<const In*>(images.data) + offset_of(images, place.image, 0, 0);
  const auto read = [&](int row, int x) {
    const int y = first_row + row, column = first_column + x;
    const bool inside = y >= 0 && y < height && column >= 0 && column < width;
    const In* const from = image + (y * images.row_stride + column * images.column_stride);
    T* const to = tile + row * Shape::kPitch + 3 * x;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      float value = 0;
      if (inside) value = fmaf(as_float(from[c * images.channel_stride]), call.scale[c], call.shift[c]);
      store(&to[c], value);
    }
  };
  for (int row = threadIdx.x / 32; row < kInRows; row += kWarps)
#pragma unroll
    for (int x = 0; x < Shape::kInColumns - 1; x += 32) read(row, x + threadIdx.x % 32);
  if (threadIdx.x < kInRows) {
    read(threadIdx.x, Shape::kInColumns - 1);
    // The last pair of taps has one more value, which does not count.
    store(&tile[threadIdx.x * Shape::kPitch + 3 * Shape::kInColumns], 0.0f);
  }
}

template <typename T>
__device__ void read_tile(const StemConv& call, const Place& place, T* tile) {
  switch (call.images.dtype) {
    case DType::kUInt8: return read_tile_of<uint8_t>(call, place, tile);
    case DType::kFloat16: return read_tile_of<__half>(call, place, tile);
    case DType::kBFloat16: return read_tile_of<__nv_bfloat16>(call, place, tile);
    default: return read_tile_of<float>(call, place, tile);
  }
}

// The weight of a tap as it is in memory, 0 where there is none.
template <typename T>
__device__ T weight_of(const StemConv& call, int64_t channel, int tap) {
  T weight;
  store(&weight, 0.0f);
  if (channel < call.out.channels) weight = static_cast<const T*>(call.weight.data)[tap_of(call.weight, channel, tap)];
  return weight;
}

template <typename T>
__device__ float bias_of(const StemConv& call, int64_t channel) {
  return channel < call.out.channels ? as_float(static_cast<const T*>(call.bias)[channel]) : 0;
}

// Writes `kCount` channels of a pixel, as a pack where `packed`.
template <typename T, int kCount>
__device__ void write(const StemConv& call, T* to, int64_t channel, const Pack<T, kCount>& values, bool packed) {
  if (packed) {
    if (channel < call.out.channels) values.store_to(to);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (channel + i < call.out.channels) to[i] = values.value[i];
}

constexpr int kPairs = 16;  // of taps: five of each row, the last of which has one tap, and one without any

template <typename T>
__global__ void __launch_bounds__(kThreads) half_kernel(
    const StemConv call, const Divisor blocks, const bool packed) {
  using Shape = Tile<T>;
  __shared__ __align__(16) T tile[kInRows * Shape::kPitch];
  __shared__ uint32_t weights[kPairs * kGroup];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const Place place(blocks, Shape::kColumns);
  read_tile(call, place, tile);

  // The lane's pairs of taps: where they are behind a pixel's first word, and what of them counts.
  int word[4];
  uint32_t counts[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pair = t + 4 * i, row = pair / 5, of_row = pair - 5 * row;
    word[i] = pair < 15 ? row * (Shape::kPitch / 2) + of_row : 0;
    counts[i] = pair == 15 ? 0 : of_row == 4 ? 0xffffu : ~0u;
  }
  for (int64_t first = 0; first < call.out.channels; first += kGroup) {
    for (int i = threadIdx.x; i < kPairs * kGroup; i += kThreads) {
      const int pair = i / kGroup, row = pair / 5, tap = kOfRow * row + 2 * (pair - 5 * row);
      T two[2];
      store(&two[0], 0.0f), store(&two[1], 0.0f);
      if (pair < 15) two[0] = weight_of<T>(call, first + i % kGroup, tap);
      if (pair < 15 && pair - 5 * row < 4) two[1] = weight_of<T>(call, first + i % kGroup, tap + 1);
      memcpy(&weights[i], two, sizeof(two));
    }
    __syncthreads();
    // Of a product's eight columns a lane gets two, so that with those of four products it has eight channels in a row.
    uint32_t b[4][2][2];
    float bias[8];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int channel = g / 2 * 8 + 2 * n + g % 2;
#pragma unroll
      for (int k = 0; k < 4; ++k) b[n][k / 2][k % 2] = weights[(t + 4 * k) * kGroup + channel];
#pragma unroll
      for (int i = 0; i < 2; ++i) bias[2 * n + i] = bias_of<T>(call, first + 8 * t + 2 * n + i);
    }
    __syncthreads();
    const int64_t channel = first + 8 * t;
    for (int row = warp; row < kRows; row += kWarps) {
      const int y = place.first_row + row;
      if (y >= call.out.height) break;
      T* to = static_cast<T*>(call.out.data) + offset_of(call.out, place.image, 0, y, place.first_column + g) + channel;
      const uint32_t* from = reinterpret_cast<const uint32_t*>(tile) + row * Shape::kPitch + 3 * g;
#pragma unroll
      for (int x = 0; x < Shape::kColumns; x += 16, from += 3 * 16, to += 16 * call.out.column_stride) {
        if (place.first_column + x >= call.out.width) break;
        uint32_t a[2][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          a[k / 2][k % 2 * 2] = from[word[k]] & counts[k];
          a[k / 2][k % 2 * 2 + 1] = from[word[k] + 3 * 8] & counts[k];
        }
        uint32_t results[2][4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float c[4] = {bias[2 * n], bias[2 * n + 1], bias[2 * n], bias[2 * n + 1]};
          multiply_add<T>(c, a[0], b[n][0]);
          multiply_add<T>(c, a[1], b[n][1]);
          results[0][n] = relu_pair<T>(c[0], c[1]), results[1][n] = relu_pair<T>(c[2], c[3]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Pack<T, 8> values;
          memcpy(&values, results[half], sizeof(values));
          if (place.first_column + x + 8 * half + g < call.out.width)
            write(call, to + 8 * half * call.out.column_stride, channel, values, packed);
        }
      }
    }
  }
}

constexpr int kPixels = 8, kChannels = 4;  // of a lane

__global__ void __launch_bounds__(kThreads) float_kernel(
    const StemConv call, const Divisor blocks, const bool packed) {
  using Shape = Tile<float>;
  __shared__ __align__(16) float tile[kInRows * Shape::kPitch];
  __shared__ __align__(16) float weights[kTaps * kGroup];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, of_channels = lane % 8 * kChannels, pixel = lane / 8;
  const Place place(blocks, Shape::kColumns);
  read_tile(call, place, tile);
  for (int64_t first = 0; first < call.out.channels; first += kGroup) {
    for (int i = threadIdx.x; i < kTaps * kGroup; i += kThreads)
      weights[i] = weight_of<float>(call, first + i % kGroup, i / kGroup);
    __syncthreads();
    const int64_t channel = first + of_channels;
    for (int row = warp; row < kRows; row += kWarps) {
      const int y = place.first_row + row;
      if (y >= call.out.height) break;
      float sums[kPixels][kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float bias = bias_of<float>(call, channel + c);
#pragma unroll
        for (int p = 0; p < kPixels; ++p) sums[p][c] = bias;
      }
#pragma unroll 1
      for (int ky = 0; ky < 3; ++ky) {
        Pack<float, kChannels> weight[kOfRow];
#pragma unroll
        for (int k = 0; k < kOfRow; ++k)
          weight[k] = Pack<float, kChannels>::load(weights + (kOfRow * ky + k) * kGroup + of_channels);
        const float* const from = tile + (2 * row + ky) * Shape::kPitch + 6 * pixel;
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          float values[kOfRow];
#pragma unroll
          for (int k = 0; k < kOfRow - 1; k += 2) {
            const auto two = Pack<float, 2>::load(from + 24 * p + k);
            values[k] = two.value[0], values[k + 1] = two.value[1];
          }
          values[kOfRow - 1] = from[24 * p + kOfRow - 1];
#pragma unroll
          for (int k = 0; k < kOfRow; ++k)
#pragma unroll
            for (int c = 0; c < kChannels; ++c) sums[p][c] = fmaf(values[k], weight[k].value[c], sums[p][c]);
        }
      }
      const int x = place.first_column + pixel;
      float* const to = static_cast<float*>(call.out.data) + offset_of(call.out, place.image, 0, y, x) + channel;
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        if (x + 4 * p >= call.out.width) break;
        Pack<float, kChannels> values;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) values.value[c] = sums[p][c] < 0 ? 0 : sums[p][c];  // keeps NaN
        write(call, to + 4 * p * call.out.column_stride, channel, values, packed);
      }
    }
    __syncthreads();
  }
}

template <typename T>
int launch(const StemConv& call, void* stream) {
  const int64_t rows = ceil_div(call.out.height, kRows);
  const dim3 grid(static_cast<unsigned>(call.out.batch * rows), blocks_for(call.out.width, Tile<T>::kColumns));
  const Divisor blocks(rows);
  constexpr int kCount = kPackBytes / sizeof(T);
  const bool packed = call.out.channels % kCount == 0 && has_packs(call.out, kCount);
  if constexpr (sizeof(T) == 2) {
    BCM_LAUNCH(half_kernel<T>, grid, kThreads, 0, stream, call, blocks, packed);
  } else {
    BCM_LAUNCH(float_kernel, grid, kThreads, 0, stream, call, blocks, packed);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace bcmfnet

extern "C" int stem_conv_cuda(const bcmfnet::StemConv* call, void* stream) {
  using namespace bcmfnet;
  return dispatch_float(call->out.dtype, [&](auto zero) { return launch<decltype(zero)>(*call, stream); });
}
