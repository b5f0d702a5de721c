// What a block of gemm_cuda.cu multiplies: the channels of its pixels and their neighbours, upsampled, added, normed and
// rectified, in shared memory.
#pragma once

#include "common/bilinear.h"
#include "common/cuda/element.h"
#include "common/cuda/mma.h"
#include "common/cuda/pack.h"
#include "common/integers.h"
#include "lmfm/gemm_cuda.h"

namespace bcmfnet {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kPatch = 8;  // columns of a tile that needs neighbours; its rows are a quarter of a warp's pixels
constexpr int kHalo = kPatch + 2;

// The pixels of a block: of a 1x1 one after the other through all images, else a patch of one image and its neighbours.
struct Tile {
  const Gemm& gemm;
  int pixels;
  unsigned number;

  __device__ bool is_patch() const { return gemm.side > 1; }

  // Rows of shared memory: how many, the one of a pixel's first tap, and from a pixel to the eighth after it.
  __device__ int rows() const { return is_patch() ? (pixels / kPatch + 2) * kHalo : pixels; }
  __device__ int row_of(int pixel) const { return is_patch() ? pixel / kPatch * kHalo + pixel % kPatch : pixel; }
  __device__ int row_step() const { return is_patch() ? kHalo : kPatch; }
  __device__ int row_of_tap(int tap) const { return tap / 3 * kHalo + tap % 3; }

  __device__ Pixel of_row(int row) const {
    return is_patch() ? in_patch(row / kHalo - 1, row % kHalo - 1) : in_order(row);
  }
  __device__ Pixel operator[](int pixel) const {
    return is_patch() ? in_patch(pixel / kPatch, pixel % kPatch) : in_order(pixel);
  }

 private:
  __device__ Pixel in_patch(int down, int across) const {
    const unsigned row = number / gemm.patches_across, image = row / gemm.patches_down;
    const int y = static_cast<int>(row - image * gemm.patches_down) * (pixels / kPatch) + down;
    const int x = static_cast<int>(number - row * gemm.patches_across) * kPatch + across;
    return {static_cast<int>(image), y, x, y >= 0 && x >= 0 && y < gemm.out.height && x < gemm.out.width};
  }
  __device__ Pixel in_order(int pixel) const {
    const int64_t all = static_cast<int64_t>(number) * pixels + pixel, row = all / gemm.out.width;
    return {static_cast<int>(row / gemm.out.height), static_cast<int>(row % gemm.out.height),
            static_cast<int>(all % gemm.out.width), row < gemm.batch * gemm.out.height};
  }
};

__device__ Place place_of(const Map& map, const Pixel& pixel, const Map& out) {
  Place place{-1, 0, 0, 0, 0};
  if (!pixel.inside || map.values == nullptr) return place;
  int x = pixel.x, y = pixel.y;
  if (map.width != out.width) {
    const Source source = source_of(x, map.width, out.width);
    x = static_cast<int>(source.low), place.right = source.weight;
    if (source.high > source.low) place.across = static_cast<int>(map.column_stride);
  }
  if (map.height != out.height) {
    const Source source = source_of(y, map.height, out.height);
    y = static_cast<int>(source.low), place.down = source.weight;
    if (source.high > source.low) place.below = static_cast<int>(map.row_stride);
  }
  place.at = map.at({pixel.image, y, x});
  return place;
}

// The places of a block, in shared memory: of all rows in the maps of all parts, then of the pixels in `out` and in
// `added`. Each is found by one lane, since one is some 200 instructions.
struct Places {
  Place* const parts;
  int64_t* const results;

  __device__ Places(void* memory, const Gemm& gemm, int rows)
      : parts(static_cast<Place*>(memory)),
        results(reinterpret_cast<int64_t*>(parts + gemm.parts * gemm.maps * rows)) {}

  __device__ void fill(const Gemms& launch, const Tile& tile) const {
    const Gemm& gemm = tile.gemm;
    const int lane = threadIdx.x % 32, rows = tile.rows(), groups = (rows + 31) / 32;
    const int all = gemm.parts * gemm.maps * groups;
    for (int item = threadIdx.x / 32; item < all + tile.pixels / 32; item += kWarps) {
      if (item < all) {
        const int number = item / groups, row = item % groups * 32 + lane;
        const Map& map = launch.part[gemm.first_part + number / gemm.maps].map[number % gemm.maps];
        if (row < rows) parts[number * rows + row] = place_of(map, tile.of_row(row), gemm.out);
      } else {
        const int number = (item - all) * 32 + lane;
        const Pixel pixel = tile[number];
        results[number] = pixel.inside ? gemm.out.at(pixel) : -1;
        results[tile.pixels + number] = gemm.added.at(pixel);
      }
    }
  }
};

// Numbers from `from` on, `stride` apart; the first `count` of them, or, as vectors, all.
template <bool kVectors, typename T, int kSize>
__device__ void read(const T* from, int64_t stride, int count, Pack<T, kSize>& to) {
  if (kVectors) {
    to = *reinterpret_cast<const Pack<T, kSize>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) to.value[i] = i < count ? from[i * stride] : T{};
  }
}

__device__ float lerp(float weight, float low, float high) { return fmaf(weight, high - low, low); }

// Some channels of a pixel's source pixels. kSmaller: the map is smaller than the result, along one axis at least.
template <bool kVectors, bool kSmaller, typename T, int kSize>
struct Sample {
  Pack<T, kSize> upper_left, upper_right, lower_left, lower_right;

  __device__ Sample(const Map& map, const Place& place, int channel, int count) {
    const T* from = static_cast<const T*>(map.values) + (place.at < 0 ? 0 : place.at) + channel * map.channel_stride;
    read<kVectors>(from, map.channel_stride, count, upper_left);
    if (!kSmaller) return;
    read<kVectors>(from + place.across, map.channel_stride, count, upper_right);
    read<kVectors>(from + place.below, map.channel_stride, count, lower_left);
    read<kVectors>(from + place.below + place.across, map.channel_stride, count, lower_right);
  }

  // Columns first.
  __device__ Pack<float, kSize> values(const Map& map, const Map& out, const Place& place) const {
    Pack<float, kSize> upper, lower;
#pragma unroll
    for (int i = 0; i < kSize; ++i) upper.value[i] = as_float(upper_left.value[i]);
    if constexpr (kSmaller) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) lower.value[i] = as_float(lower_left.value[i]);
      if (map.width != out.width) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          upper.value[i] = lerp(place.right, upper.value[i], as_float(upper_right.value[i]));
          lower.value[i] = lerp(place.right, lower.value[i], as_float(lower_right.value[i]));
        }
      }
      if (map.height != out.height) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) upper.value[i] = lerp(place.down, upper.value[i], lower.value[i]);
      }
    }
    return upper;
  }
};

// Numbers of which the negative ones become 0, to shared memory, or nothing but 0; NaN stays.
template <typename T, int kSize>
__device__ void store_relu(const Pack<float, kSize>& from, bool keeps, T* to) {
  Pack<uint32_t, kSize / 2> pairs;
#pragma unroll
  for (int i = 0; i < kSize; i += 2) {
    const uint32_t pair = relu_pair<T>(from.value[i], from.value[i + 1]);
    pairs.value[i / 2] = keeps ? pair : 0;
  }
  *reinterpret_cast<Pack<uint32_t, kSize / 2>*>(to) = pairs;
}

template <int kSize>
__device__ void store_relu(const Pack<float, kSize>& from, bool keeps, float* to) {
  Pack<float, kSize> result;
#pragma unroll
  for (int i = 0; i < kSize; ++i) result.value[i] = !keeps || from.value[i] < 0 ? 0.0f : from.value[i];
  *reinterpret_cast<Pack<float, kSize>*>(to) = result;
}

// A part's channels [from, until) at all rows of a tile, to shared memory: 0 outside the map and in the padding.
// kVectors: its maps and norms can be read in whole groups; what is not wanted of them is read in another place. No
// branch stands between the loads, so that a thread waits for all of them at once. kSmaller: so many of the maps are
// smaller than the result.
template <bool kVectors, int kMaps, int kSmaller, typename T>
__device__ void activate(
    const Gemm& gemm, const Part& part, const Place* places, int rows, int from, int until, T* to) {
  // As much as a load brings, or as fits into registers.
  constexpr int kSize = kVectors ? kPackBytes / sizeof(T) : kSmaller == 0 ? kGroup / 2 : kGroup / 4;
  const Map &first = part.map[0], &second = part.map[kMaps - 1], &out = gemm.out;
  // Lanes: along pixels, or along as many channels as there are.
  int row_of_thread = threadIdx.x % 32, group_of_thread = threadIdx.x / 32, rows_at_once = 32;
  if (first.channel_stride == 1) {
    const int along = until - from >= 32 * kSize ? 5 : until - from >= 16 * kSize ? 4 : 2;
    row_of_thread = threadIdx.x >> along, group_of_thread = threadIdx.x & ((1 << along) - 1);
    rows_at_once = kThreads >> along;
  }
  for (int channel = from + kSize * group_of_thread; channel < until; channel += kThreads / rows_at_once * kSize) {
    const int count = smaller_of(gemm.channels - channel, kSize), readable = count > 0 ? channel : 0;
    Pack<float, kSize> multiplier, shift;
    read<kVectors>(part.norm.multipliers + readable, 1, count, multiplier);
    read<kVectors>(part.norm.shifts + readable, 1, count, shift);
#pragma unroll(kVectors && kMaps == 1 && kSmaller == 0 ? 2 : 1)
    for (int row = row_of_thread; row < rows; row += rows_at_once) {
      const Place &place = places[row], &second_place = places[rows + row];
      const Sample<kVectors, kSmaller >= 1, T, kSize> sample(first, place, readable, count);
      Pack<float, kSize> value;
      if constexpr (kMaps == 2) {
        const Sample<kVectors, kSmaller == 2, T, kSize> other(second, second_place, readable, count);
        value = sample.values(first, out, place);
        const Pack<float, kSize> more = other.values(second, out, second_place);
#pragma unroll
        for (int i = 0; i < kSize; ++i) value.value[i] += more.value[i];
      } else {
        value = sample.values(first, out, place);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) value.value[i] = fmaf(multiplier.value[i], value.value[i], shift.value[i]);
      store_relu(value, count > 0 && place.at >= 0, to + row * gemm.pitch + channel);
    }
  }
}

template <typename T>
__device__ void activate(
    const Gemm& gemm, const Part& part, const Place* places, int rows, int from, int until, T* to) {
  if (gemm.maps == 1 || part.map[1].values == nullptr) {
    if (part.vectors) {
      if (part.smaller == 0) return activate<true, 1, 0>(gemm, part, places, rows, from, until, to);
      return activate<true, 1, 1>(gemm, part, places, rows, from, until, to);
    }
    if (part.smaller == 0) return activate<false, 1, 0>(gemm, part, places, rows, from, until, to);
    return activate<false, 1, 1>(gemm, part, places, rows, from, until, to);
  }
  if (!part.vectors) return activate<false, 2, 2>(gemm, part, places, rows, from, until, to);
  if (part.smaller == 0) return activate<true, 2, 0>(gemm, part, places, rows, from, until, to);
  if (part.smaller == 1) return activate<true, 2, 1>(gemm, part, places, rows, from, until, to);
  return activate<true, 2, 2>(gemm, part, places, rows, from, until, to);
}

}  // namespace
}  // namespace bcmfnet
