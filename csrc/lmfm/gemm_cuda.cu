// A block activates its pixels and their neighbours once, to shared memory; its warps then take parts of the inner
// dimension, read weights straight from global memory (no two of them the same), and their sums are added in a fixed
// order.
//
// Why so: one image of 16x32 has 512 pixels and 128 outputs, and an H200 132 multiprocessors. A tile of 32x32, or 32x16
// where even that leaves less than a block for each of them, has no more than one warp's sums; eight warps that divide
// the inner dimension keep enough loads under way.
#include "lmfm/gemm_cuda.h"

#include "common/bilinear.h"
#include "common/cuda/element.h"
#include "common/cuda/grid.h"
#include "common/cuda/pack.h"
#include "lmfm/mma.h"

namespace bcmfnet {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kAlign = 32;    // The channels of each part of the inner dimension are padded to a multiple of this.
constexpr int kPatch = 8;     // columns of a tile that needs neighbours; its rows are a quarter of a warp's pixels
constexpr int kHalo = kPatch + 2;
constexpr int kBlocks = 120;  // So many are wanted at once: about one for each multiprocessor of an H200.
constexpr Shape kShapes[] = {{8, 4, 2, 1}, {8, 2, 2, 2}, {8, 1, 1, 8}, {4, 1, 1, 8}};

__device__ uint32_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ uint32_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

// The pixels of a block: of a 1x1 one after the other through all images, else a patch of one image and its neighbours.
struct Tile {
  const Gemm& gemm;
  int pixels;
  int64_t first;
  int image, y, x;

  __device__ Tile(const Gemm& gemm, int pixels, int64_t number) : gemm(gemm), pixels(pixels) {
    const int64_t across = ceil_div(gemm.out.width, kPatch), down = ceil_div(gemm.out.height, pixels / kPatch);
    first = number * pixels;
    image = static_cast<int>(number / (across * down));
    y = static_cast<int>(number / across % down) * (pixels / kPatch);
    x = static_cast<int>(number % across) * kPatch;
  }
  __device__ bool is_patch() const { return gemm.side > 1; }

  // Rows of shared memory: how many, the one of a pixel's first tap, and from a pixel to the eighth after it.
  __device__ int rows() const { return is_patch() ? (pixels / kPatch + 2) * kHalo : pixels; }
  __device__ int row_of(int pixel) const { return is_patch() ? pixel / kPatch * kHalo + pixel % kPatch : pixel; }
  __device__ int row_step() const { return is_patch() ? kHalo : kPatch; }
  __device__ int row_of_tap(int tap) const { return tap / 3 * kHalo + tap % 3; }

  __device__ Pixel of_row(int row) const {
    return is_patch() ? in_patch(y - 1 + row / kHalo, x - 1 + row % kHalo) : in_order(first + row);
  }
  __device__ Pixel operator[](int pixel) const {
    return is_patch() ? in_patch(y + pixel / kPatch, x + pixel % kPatch) : in_order(first + pixel);
  }

 private:
  __device__ Pixel in_patch(int y, int x) const {
    const bool inside = y >= 0 && x >= 0 && y < gemm.out.height && x < gemm.out.width;
    return inside ? Pixel{image, y, x, true} : Pixel{0, 0, 0, false};
  }
  __device__ Pixel in_order(int64_t number) const {
    const int64_t row = number / gemm.out.width;
    if (row >= gemm.batch * gemm.out.height) return {0, 0, 0, false};
    return {static_cast<int>(row / gemm.out.height), static_cast<int>(row % gemm.out.height),
            static_cast<int>(number % gemm.out.width), true};
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

// Where a pixel of `out` finds its source pixels in a map. An axis that keeps its size is copied.
struct Place {
  int64_t at;           // of the upper left one
  bool right, down;     // whether there are others
  float across, below;  // their weights

  __device__ Place(const Map& map, const Pixel& pixel, const Map& out)
      : right(false), down(false), across(0), below(0) {
    int x = pixel.x, y = pixel.y;
    if (map.width != out.width) {
      const Source source = source_of(x, map.width, out.width);
      x = static_cast<int>(source.low), across = source.weight, right = source.high > source.low;
    }
    if (map.height != out.height) {
      const Source source = source_of(y, map.height, out.height);
      y = static_cast<int>(source.low), below = source.weight, down = source.high > source.low;
    }
    at = map.at({pixel.image, y, x});
  }
};

// Some channels of a pixel's source pixels. kUp: the map is smaller than the result, along one axis at least.
template <bool kVectors, bool kUp, typename T, int kSize>
struct Sample {
  Pack<T, kSize> upper_left, upper_right, lower_left, lower_right;

  __device__ Sample(const Map& map, const Place& place, int channel, int count) {
    const T* from = static_cast<const T*>(map.values) + place.at + channel * map.channel_stride;
    read<kVectors>(from, map.channel_stride, count, upper_left);
    if (!kUp) return;
    const int64_t across = place.right ? map.column_stride : 0, below = place.down ? map.row_stride : 0;
    read<kVectors>(from + across, map.channel_stride, count, upper_right);
    read<kVectors>(from + below, map.channel_stride, count, lower_left);
    read<kVectors>(from + below + across, map.channel_stride, count, lower_right);
  }

  // Columns first.
  __device__ float value(int i, const Map& map, const Map& out, const Place& place) const {
    float upper = as_float(upper_left.value[i]);
    if (!kUp) return upper;
    float lower = as_float(lower_left.value[i]);
    if (map.width != out.width) {
      upper = lerp(place.across, upper, as_float(upper_right.value[i]));
      lower = lerp(place.across, lower, as_float(lower_right.value[i]));
    }
    return map.height != out.height ? lerp(place.below, upper, lower) : upper;
  }
};

// A part's channels [from, until) at all pixels of a tile, to shared memory: 0 outside the map and in the padding.
// kVectors: its maps and norms can be read in whole groups; what is not wanted of them is read in another place. No
// branch stands between the loads, so that a thread waits for all of them at once.
template <bool kVectors, int kMaps, bool kUp, typename T>
__device__ void activate(const Gemms& launch, const Part& part, const Tile& tile, int from, int until, T* to) {
  constexpr int kSize = !kUp ? kGroup : kVectors ? kGroup / 2 : kGroup / 4;  // as much as fits into registers
  const Gemm& gemm = tile.gemm;
  const Map &first = part.map[0], &second = part.map[kMaps - 1], &out = gemm.out;
  const bool along = first.channel_stride == 1;  // lanes: along channels, or along pixels
  const int row_of_thread = along ? threadIdx.x / 8 : threadIdx.x % 32;
  const int group_of_thread = along ? threadIdx.x % 8 : threadIdx.x / 32;
  for (int row = row_of_thread; row < tile.rows(); row += 32) {
    const Pixel pixel = tile.of_row(row);
    const Place place(first, pixel, out), second_place(second, pixel, out);
#pragma unroll(kVectors && kMaps == 1 && !kUp ? 2 : 1)
    for (int channel = from + kSize * group_of_thread; channel < until; channel += 8 * kSize) {
      const int count = pixel.inside ? smaller_of(gemm.channels - channel, kSize) : 0;
      const int readable = count > 0 ? channel : 0;
      const Sample<kVectors, kUp, T, kSize> sample(first, place, readable, count);
      const Sample<kVectors, kUp, T, kSize> second_sample(second, second_place, readable, count);
      Pack<float, kSize> multiplier, shift;
      read<kVectors>(part.norm.multipliers + readable, 1, count, multiplier);
      read<kVectors>(part.norm.shifts + readable, 1, count, shift);
      Pack<T, kSize> result;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        float value = sample.value(i, first, out, place);
        if (kMaps == 2) value += second_sample.value(i, second, out, second_place);
        const float normed = fmaf(multiplier.value[i], value, shift.value[i]);
        store(&result.value[i], i >= count || normed < 0 ? 0.0f : normed);  // NaN stays
      }
      *reinterpret_cast<Pack<T, kSize>*>(to + row * gemm.pitch + channel) = result;
    }
  }
}

__device__ bool is_smaller(const Map& map, const Map& out) {
  return map.values != nullptr && (map.width != out.width || map.height != out.height);
}

template <bool kVectors, typename T>
__device__ void activate(const Gemms& launch, const Part& part, const Tile& tile, int from, int until, T* to) {
  const Map& out = tile.gemm.out;
  const bool up = is_smaller(part.map[0], out) || is_smaller(part.map[1], out), two = part.map[1].values != nullptr;
  if (two) {
    if (up) {
      activate<kVectors, 2, true>(launch, part, tile, from, until, to);
    } else {
      activate<kVectors, 2, false>(launch, part, tile, from, until, to);
    }
  } else if (up) {
    activate<kVectors, 1, true>(launch, part, tile, from, until, to);
  } else {
    activate<kVectors, 1, false>(launch, part, tile, from, until, to);
  }
}

// Weights of one step along the inner dimension that a lane holds, and the product of a warp with them. With
// g = lane / 4 and t = lane % 4, a lane has the sums of the pixels g + 8 i and the outputs kColumns * t + j. A step of
// 32 is two of the tensor core's: the order of inner positions and of outputs is free, and chosen so that a lane finds
// its 8 inner positions of a pixel, and its kColumns / 2 outputs of a row of weights, side by side.
template <typename T, int kColumns>
struct Fragment {
  static constexpr int kStep = 32, kEach = kColumns / 2;
  Pack<uint32_t, kEach / 2> row[8];

  // From the step's first row and the warp's first output; `rows` and `columns` are left from there.
  __device__ void load(const T* weights, int64_t outputs, int rows, int columns, bool vectors) {
    const int first = threadIdx.x % 4 * 8, column = threadIdx.x % 32 / 4 * kEach;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const T* from = weights + (first + i) * outputs + column;
      const int count = first + i < rows ? smaller_of(columns - column, kEach) : 0;
      if (vectors && count >= kEach) {
        row[i] = *reinterpret_cast<const Pack<uint32_t, kEach / 2>*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kEach; j += 2) {
          const uint32_t low = j < count ? bits_of(from[j]) : 0, high = j + 1 < count ? bits_of(from[j + 1]) : 0;
          row[i].value[j / 2] = low | high << 16;
        }
      }
    }
  }

  // An output's weights at two inner positions.
  __device__ uint32_t pair(int first, int output) const {
    const uint32_t low = row[first].value[output / 2], high = row[first + 1].value[output / 2];
    return output % 2 == 0 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & 0xffff0000u);
  }

  // `pixels` is the lane's first pixel at the step's first inner position; the next are `pitch` apart.
  __device__ void multiply(const T* pixels, int pitch, float (&sums)[4][kColumns]) const {
    Pack<uint32_t, 4> a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = *reinterpret_cast<const Pack<uint32_t, 4>*>(pixels + i * pitch + threadIdx.x % 4 * 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const uint32_t b[2] = {pair(4 * half, j), pair(4 * half + 2, j)};
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t rows[4] = {a[i].value[2 * half], a[i + 1].value[2 * half], a[i].value[2 * half + 1],
                                    a[i + 1].value[2 * half + 1]};
          float c[4] = {sums[i][j], sums[i][kEach + j], sums[i + 1][j], sums[i + 1][kEach + j]};
          multiply_add<T>(c, rows, b);
          sums[i][j] = c[0], sums[i][kEach + j] = c[1], sums[i + 1][j] = c[2], sums[i + 1][kEach + j] = c[3];
        }
      }
    }
  }
};

template <int kColumns>
struct Fragment<float, kColumns> {
  static constexpr int kStep = 16 / kColumns;
  float row[kStep][kColumns];

  __device__ void load(const float* weights, int64_t outputs, int rows, int columns, bool vectors) {
    const int column = threadIdx.x % 4 * kColumns;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        const float* from = weights + i * outputs + column + j;
        const int count = i < rows ? smaller_of(columns - column - j, 4) : 0;
        Pack<float, 4> four;
        if (vectors && count >= 4) {
          four = *reinterpret_cast<const Pack<float, 4>*>(from);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) four.value[k] = k < count ? from[k] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) row[i][j + k] = four.value[k];
      }
    }
  }

  __device__ void multiply(const float* pixels, int pitch, float (&sums)[4][kColumns]) const {
    Pack<float, kStep> a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const Pack<float, kStep>*>(pixels + i * pitch);
#pragma unroll
    for (int k = 0; k < kStep; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[i][j] = fmaf(a[i].value[k], row[k][j], sums[i][j]);
  }
};

// A warp's steps through the taps and a chunk [begin, end) of the inner dimension: one of `warps` even parts of them.
template <int kStep>
struct Steps {
  const Gemm& gemm;
  const int begin, length;
  int left, tap;
  int position, part, channel;  // in the chunk; the part that this is, and the channel of it

  __device__ Steps(const Gemm& gemm, int begin, int end, int warp, int warps)
      : gemm(gemm), begin(begin), length(end - begin) {
    const int each = length / kStep, all = each * gemm.side * gemm.side;
    const int first = all * warp / warps;
    left = all * (warp + 1) / warps - first;
    tap = first / each;
    go_to(first % each * kStep);
  }
  __device__ void advance() {
    --left, position += kStep, channel += kStep;
    if (channel == gemm.part_inner) channel = 0, ++part;
    if (position == length) ++tap, go_to(0);
  }
  __device__ int64_t weight_row() const {
    return static_cast<int64_t>(part * gemm.side * gemm.side + tap) * gemm.channels + channel;
  }

 private:
  __device__ void go_to(int to) {
    position = to;
    part = (begin + to) / gemm.part_inner;
    channel = (begin + to) % gemm.part_inner;
  }
};

// Floats from pixel to pixel of a warp's sums in shared memory: 8 lanes that store 16 bytes each meet all banks.
template <int kColumns>
constexpr int kSumsPitch = 4 * kColumns + (kColumns == 8 ? 4 : 0);

// A lane's sums to shared memory, added to what is there.
template <int kColumns>
__device__ void keep(const float (&sums)[4][kColumns], bool adds, float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 4) {
      auto& four = *reinterpret_cast<Pack<float, 4>*>(to + 8 * i * kSumsPitch<kColumns> + j);
      Pack<float, 4> sum = adds ? four : Pack<float, 4>{};
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.value[k] += sums[i][j + k];
      four = sum;
    }
  }
}

// The sums of a block's tile over its warps, and what is added, to where they belong.
template <typename T, int kColumns>
__device__ void write(const Gemms& launch, const Tile& tile, int first_output, const float* sums) {
  constexpr int kPitch = kSumsPitch<kColumns>, kOutputs = 4 * kColumns;
  const Gemm& gemm = tile.gemm;
  const Shape& shape = launch.shape;
  const bool along = gemm.out.channel_stride == 1;
  const int quads = shape.outputs() / 4;
  for (int i = threadIdx.x; i < shape.pixels() * quads; i += kThreads) {
    const int number = along ? i / quads : i % shape.pixels();
    const int column = 4 * (along ? i % quads : i / shape.pixels());
    const Pixel pixel = tile[number];
    const int count = smaller_of(gemm.outputs - first_output - column, 4);
    if (!pixel.inside || count <= 0) continue;
    const int warp = number / kPixels * shape.across + column / kOutputs;
    const float* from = sums + (warp * kPixels + number % kPixels) * kPitch + column % kOutputs;
    Pack<float, 4> sum{};
    for (int deep = 0; deep < shape.deep; ++deep, from += shape.down * shape.across * kPixels * kPitch) {
      const auto part = *reinterpret_cast<const Pack<float, 4>*>(from);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.value[j] += part.value[j];
    }
    if (gemm.added.values != nullptr) {
      const int64_t at = gemm.added.at(pixel) + first_output + column;
      const auto added = *reinterpret_cast<const Pack<T, 4>*>(static_cast<const T*>(gemm.added.values) + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.value[j] += as_float(added.value[j]);
    }
    T* to = static_cast<T*>(gemm.out.values) + gemm.out.at(pixel) +
            (first_output + column) * gemm.out.channel_stride;
    if (gemm.out.vectors && count == 4) {
      Pack<T, 4> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) store(&four.value[j], sum.value[j]);
      *reinterpret_cast<Pack<T, 4>*>(to) = four;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < count) store(to + j * gemm.out.channel_stride, sum.value[j]);
    }
  }
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) gemm_kernel(const __grid_constant__ Gemms launch) {
  using Weights = Fragment<T, kColumns>;
  BCM_DYNAMIC_SHARED(float, sums_of_warps);  // then activated pixels [rows, pitch]
  constexpr int kPitch = kSumsPitch<kColumns>;
  T* const pixels = reinterpret_cast<T*>(sums_of_warps + kWarps * kPixels * kPitch);
  const Shape& shape = launch.shape;

  int which = 0;
  while (which + 1 < launch.count && blockIdx.x >= launch.gemm[which + 1].first_block) ++which;
  const Gemm& gemm = launch.gemm[which];
  const int64_t block = blockIdx.x - gemm.first_block, tiles_across = ceil_div(gemm.outputs, shape.outputs());
  const Tile tile(gemm, shape.pixels(), block / tiles_across);
  const int first_output = static_cast<int>(block % tiles_across) * shape.outputs();

  const int warp = threadIdx.x / 32, deep = warp / (shape.down * shape.across);
  const int down = warp / shape.across % shape.down, across = warp % shape.across;
  const int output = first_output + across * 4 * kColumns;
  const T* const weights = static_cast<const T*>(gemm.weights) + output;
  const T* const own = pixels + tile.row_of(down * kPixels + threadIdx.x % 32 / 4) * gemm.pitch;
  float* const to = sums_of_warps + (warp * kPixels + threadIdx.x % 32 / 4) * kPitch + threadIdx.x % 4 * kColumns;

  for (int begin = 0; begin < gemm.inner; begin += gemm.chunk) {
    const int end = smaller_of(begin + gemm.chunk, gemm.inner);
    if (begin > 0) __syncthreads();  // the chunk before has been read
    for (int part = begin / gemm.part_inner; part * gemm.part_inner < end; ++part) {
      const int first = part * gemm.part_inner;
      const int from = larger_of(begin - first, 0), until = smaller_of(end - first, gemm.part_inner);
      const Part& each = launch.part[gemm.first_part + part];
      if (each.vectors) {
        activate<true>(launch, each, tile, from, until, pixels + first - begin);
      } else {
        activate<false>(launch, each, tile, from, until, pixels + first - begin);
      }
    }
    Steps<Weights::kStep> steps(gemm, begin, end, deep, shape.deep);
    Weights next;
    const auto load = [&] {
      if (steps.left > 0) {
        next.load(weights + steps.weight_row() * gemm.outputs, gemm.outputs, gemm.channels - steps.channel,
                  gemm.outputs - output, gemm.weight_vectors);
      }
    };
    float sums[4][kColumns] = {};
    load();
    __syncthreads();
    while (steps.left > 0) {
      const Weights current = next;
      const T* const at = own + tile.row_of_tap(steps.tap) * gemm.pitch + steps.position;
      steps.advance();
      load();
      current.multiply(at, tile.row_step() * gemm.pitch, sums);
    }
    keep(sums, begin > 0, to);
  }
  __syncthreads();
  write<T, kColumns>(launch, tile, first_output, sums_of_warps);
}

bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Numbers the blocks of all products; returns how many there are.
int64_t assign_blocks(Gemms& launch) {
  const Shape& shape = launch.shape;
  int64_t blocks = 0;
  for (int i = 0; i < launch.count; ++i) {
    Gemm& gemm = launch.gemm[i];
    const int64_t pixels = gemm.batch * gemm.out.height * gemm.out.width;
    const int64_t patches =
        gemm.batch * ceil_div(gemm.out.width, kPatch) * ceil_div(gemm.out.height, shape.pixels() / kPatch);
    gemm.first_block = blocks;
    blocks += (gemm.side > 1 ? patches : ceil_div(pixels, shape.pixels())) * ceil_div(gemm.outputs, shape.outputs());
  }
  return blocks;
}

// Lays out shared memory: as few and even chunks of the inner dimension as fit. Rows of activated pixels lie so that
// lanes that read neighbours meet other banks: 64 bytes further (16 for float32) modulo 128. Returns its bytes.
int64_t assign_chunks(Gemms& launch, int64_t size) {
  const int pitch = launch.shape.columns == 8 ? kSumsPitch<8> : kSumsPitch<4>;
  const int64_t sums = int64_t{kWarps} * kPixels * pitch * 4;
  int64_t bytes = 0;
  for (int i = 0; i < launch.count; ++i) {
    Gemm& gemm = launch.gemm[i];
    const int64_t pixels = launch.shape.pixels(), gap = size == 2 ? 32 : 4;
    const int64_t rows = gemm.side > 1 ? (pixels / kPatch + 2) * kHalo : pixels;
    const int64_t most = ((kMostShared - sums) / (rows * size) - gap) / 64 * 64;
    gemm.chunk = static_cast<int>(round_up(ceil_div(gemm.inner, ceil_div(gemm.inner, most)), 64));
    gemm.pitch = gemm.chunk + static_cast<int>(gap);
    bytes = larger_of(bytes, rows * gemm.pitch * size);
  }
  return sums + bytes;
}

}  // namespace

void Gemms::add(const Map& first, const Map& second, const Norms& norm, int64_t channels) {
  const bool vectors = first.vectors && (second.values == nullptr || second.vectors) && channels % kGroup == 0 &&
                       is_aligned(norm.multipliers, 16) && is_aligned(norm.shifts, 16);
  part[parts++] = {{first, second}, norm, vectors};
}

void Gemms::add(
    DType dtype, const void* weights, int side, int64_t channels, int64_t outputs, int64_t batch, const Map& out,
    const Map& added) {
  Gemm& next = gemm[count];
  next.weights = weights, next.side = side, next.channels = static_cast<int>(channels);
  next.outputs = static_cast<int>(outputs);
  next.weight_vectors = outputs % 4 == 0 && is_aligned(weights, 4 * size_of(dtype));
  next.first_part = count == 0 ? 0 : gemm[count - 1].first_part + gemm[count - 1].parts;
  next.parts = parts - next.first_part, next.part_inner = static_cast<int>(round_up(channels, kAlign));
  next.inner = next.parts * next.part_inner;
  next.batch = batch, next.out = out, next.added = added;
  ++count;
}

int launch_gemms(DType dtype, Gemms launch, void* stream) {
  if (launch.count == 0) return 0;
  int64_t blocks = 0;
  for (const Shape& shape : kShapes) {
    launch.shape = shape;
    blocks = assign_blocks(launch);
    if (blocks >= kBlocks) break;
  }
  const int64_t bytes = assign_chunks(launch, size_of(dtype));
  return dispatch_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = launch.shape.columns == 8 ? gemm_kernel<T, 8> : gemm_kernel<T, 4>;
    return launch_with_shared(kernel, static_cast<unsigned>(blocks), kThreads, bytes, stream, launch);
  });
}

}  // namespace bcmfnet
