// The module on a GPU, as a sequence of launches without a wait:
//
//   pools       of x, by pyramid_pool
//   scale       the 1x1 of each branch, and the shortcut
//   process     the fusing convolutions, a launch for those that wait for no other of their launch
//   compression the 1x1 of all branches, and the sum with the shortcut
//
// All but the first are one kernel. It makes several products at once: of pixels, whose channels are read through
// upsampling, sum, norm and ReLU ("activated"), with weights. A block activates its pixels and their neighbours once,
// to shared memory; its warps then take parts of the inner dimension, read weights straight from global memory (no two
// of them the same), and their sums are added in a fixed order.
//
// Why so: one image of 16x32 has 512 pixels and 128 outputs, and an H200 132 multiprocessors. A tile of 32x32, or 32x16
// where even that leaves less than a block for each of them, has no more than one warp's sums; eight warps that share
// the inner dimension keep enough loads under way.
#include "common/bilinear.h"
#include "common/element_cuda.h"
#include "common/launch.h"
#include "common/mma.h"
#include "lmfm/lmfm_cuda.h"
#include "pyramid_pool/pyramid_pool_cuda.h"

namespace bcmfnet {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kPixels = 32;   // of a warp's tile
constexpr int kGroup = 8;     // channels that a thread activates at a time, at most: 16 bytes of 16-bit numbers
constexpr int kAlign = 32;    // the channels of each part of the inner dimension are padded to a multiple of this
constexpr int kPatch = 8;     // columns of a tile that needs neighbours; its rows are a quarter of a warp's pixels
constexpr int kHalo = kPatch + 2;
constexpr int kBlocks = 120;  // wanted at once: about one for each multiprocessor of an H200
constexpr int64_t kShared = 96 << 10;  // bytes that a block may take on every GPU from sm_80 on
constexpr int64_t kSharedUnasked = 48 << 10;
constexpr int kMostProducts = kMaxBranches + 1;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <typename T>
__host__ __device__ T smaller_of(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
__host__ __device__ T larger_of(T a, T b) {
  return a > b ? a : b;
}

struct Pixel {
  int image, y, x;
  bool inside = true;  // of the map; else it stands for the first pixel, which may be read
};

// Values [batch, channels, height, width].
struct Map {
  void* values;  // null: there is no such map
  int height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
  bool vectors;  // kGroup channels (4 of a result) from a multiple of it lie side by side and are aligned

  __device__ int64_t at(const Pixel& pixel) const {
    return pixel.image * batch_stride + pixel.y * row_stride + pixel.x * column_stride;
  }
};

// Channels of the inner dimension: relu(norm(U(map[0]) + U(map[1]))).
struct Part {
  Map map[2];
  const float* norm;  // multipliers; the shifts lie norm_stride further
  bool vectors;       // all of it can be read kGroup channels at a time
};

// out = convolution of some parts + added. Weights are [parts, side * side, channels, outputs].
struct Product {
  int64_t first_block;  // of the launch
  const void* weights;
  bool weight_vectors;  // rows of weights are aligned for vectors
  int first_part, parts;
  int side;                         // of the convolution, 1 or 3
  int channels, part_inner, inner;  // of a part, with padding, and of all parts
  int chunk, pitch;                 // of `inner` that is in shared memory at once, and from pixel to pixel there
  int outputs;
  int64_t batch;
  Map out, added;
};

// How a block's warps share a tile: `down` times its pixels, `across` its outputs, `deep` its inner dimension. A lane
// has 4 pixels and `columns` outputs.
struct Shape {
  int columns, down, across, deep;

  __host__ __device__ int pixels() const { return down * kPixels; }
  __host__ __device__ int outputs() const { return across * 4 * columns; }
};
constexpr Shape kShapes[] = {{8, 4, 2, 1}, {8, 2, 2, 2}, {8, 1, 1, 8}, {4, 1, 1, 8}};

struct Launch {
  Part part[kMostProducts];
  Product product[kMostProducts];
  int parts, products;
  int64_t norm_stride;
  Shape shape;
};

__device__ uint32_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ uint32_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

// Values that are loaded and stored at once, or by 16 bytes.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T value[kCount];
};

// The pixels of a block: of a 1x1 one after the other through all images, else a patch of one image and its neighbours.
struct Tile {
  const Product& product;
  int pixels;
  int64_t first;
  int image, y, x;

  __device__ Tile(const Product& product, int pixels, int64_t number) : product(product), pixels(pixels) {
    const int64_t across = ceil_div(product.out.width, kPatch), down = ceil_div(product.out.height, pixels / kPatch);
    first = number * pixels;
    image = static_cast<int>(number / (across * down));
    y = static_cast<int>(number / across % down) * (pixels / kPatch);
    x = static_cast<int>(number % across) * kPatch;
  }
  __device__ bool is_patch() const { return product.side > 1; }

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
    const bool inside = y >= 0 && x >= 0 && y < product.out.height && x < product.out.width;
    return inside ? Pixel{image, y, x, true} : Pixel{0, 0, 0, false};
  }
  __device__ Pixel in_order(int64_t number) const {
    const int64_t row = number / product.out.width;
    if (row >= product.batch * product.out.height) return {0, 0, 0, false};
    return {static_cast<int>(row / product.out.height), static_cast<int>(row % product.out.height),
            static_cast<int>(number % product.out.width), true};
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

__device__ float lerp(float share, float low, float high) { return fmaf(share, high - low, low); }

// Where a pixel of `out` finds its source pixels in a map. An axis that keeps its size is copied.
struct Place {
  int64_t at;           // of the upper left one
  bool right, down;     // whether there are others
  float across, below;  // their shares

  __device__ Place(const Map& map, const Pixel& pixel, const Map& out)
      : right(false), down(false), across(0), below(0) {
    int x = pixel.x, y = pixel.y;
    if (map.width != out.width) {
      const Source source = source_of(x, map.width, out.width);
      x = static_cast<int>(source.low), across = source.share, right = source.high > source.low;
    }
    if (map.height != out.height) {
      const Source source = source_of(y, map.height, out.height);
      y = static_cast<int>(source.low), below = source.share, down = source.high > source.low;
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
__device__ void activate(const Launch& launch, const Part& part, const Tile& tile, int from, int until, T* to) {
  constexpr int kSize = !kUp ? kGroup : kVectors ? kGroup / 2 : kGroup / 4;  // as much as fits into registers
  const Product& product = tile.product;
  const Map &first = part.map[0], &second = part.map[kMaps - 1], &out = product.out;
  const bool along = first.channel_stride == 1;  // lanes: along channels, or along pixels
  const int row_of_thread = along ? threadIdx.x / 8 : threadIdx.x % 32;
  const int group_of_thread = along ? threadIdx.x % 8 : threadIdx.x / 32;
  for (int row = row_of_thread; row < tile.rows(); row += 32) {
    const Pixel pixel = tile.of_row(row);
    const Place place(first, pixel, out), second_place(second, pixel, out);
#pragma unroll(kVectors && kMaps == 1 && !kUp ? 2 : 1)
    for (int channel = from + kSize * group_of_thread; channel < until; channel += 8 * kSize) {
      const int count = pixel.inside ? smaller_of(product.channels - channel, kSize) : 0;
      const int readable = count > 0 ? channel : 0;
      const Sample<kVectors, kUp, T, kSize> sample(first, place, readable, count);
      const Sample<kVectors, kUp, T, kSize> second_sample(second, second_place, readable, count);
      Pack<float, kSize> multiplier, shift;
      read<kVectors>(part.norm + readable, 1, count, multiplier);
      read<kVectors>(part.norm + launch.norm_stride + readable, 1, count, shift);
      Pack<T, kSize> result;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        float value = sample.value(i, first, out, place);
        if (kMaps == 2) value += second_sample.value(i, second, out, second_place);
        const float normed = fmaf(multiplier.value[i], value, shift.value[i]);
        store(&result.value[i], i >= count || normed < 0 ? 0.0f : normed);  // NaN stays
      }
      *reinterpret_cast<Pack<T, kSize>*>(to + row * product.pitch + channel) = result;
    }
  }
}

__device__ bool is_smaller(const Map& map, const Map& out) {
  return map.values != nullptr && (map.width != out.width || map.height != out.height);
}

template <bool kVectors, typename T>
__device__ void activate(const Launch& launch, const Part& part, const Tile& tile, int from, int until, T* to) {
  const Map& out = tile.product.out;
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

// A warp's steps through the taps and a chunk [begin, end) of the inner dimension: a share of all of them.
template <int kStep>
struct Steps {
  const Product& product;
  const int begin, length;
  int left, tap;
  int position, part, channel;  // in the chunk; the part that this is, and the channel of it

  __device__ Steps(const Product& product, int begin, int end, int share, int shares)
      : product(product), begin(begin), length(end - begin) {
    const int each = length / kStep, all = each * product.side * product.side;
    const int first = all * share / shares;
    left = all * (share + 1) / shares - first;
    tap = first / each;
    go_to(first % each * kStep);
  }
  __device__ void advance() {
    --left, position += kStep, channel += kStep;
    if (channel == product.part_inner) channel = 0, ++part;
    if (position == length) ++tap, go_to(0);
  }
  __device__ int64_t weight_row() const {
    return static_cast<int64_t>(part * product.side * product.side + tap) * product.channels + channel;
  }

 private:
  __device__ void go_to(int to) {
    position = to;
    part = (begin + to) / product.part_inner;
    channel = (begin + to) % product.part_inner;
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
__device__ void write(const Launch& launch, const Tile& tile, int first_output, const float* sums) {
  constexpr int kPitch = kSumsPitch<kColumns>, kOutputs = 4 * kColumns;
  const Product& product = tile.product;
  const Shape& shape = launch.shape;
  const bool along = product.out.channel_stride == 1;
  const int quads = shape.outputs() / 4;
  for (int i = threadIdx.x; i < shape.pixels() * quads; i += kThreads) {
    const int number = along ? i / quads : i % shape.pixels();
    const int column = 4 * (along ? i % quads : i / shape.pixels());
    const Pixel pixel = tile[number];
    const int count = smaller_of(product.outputs - first_output - column, 4);
    if (!pixel.inside || count <= 0) continue;
    const int warp = number / kPixels * shape.across + column / kOutputs;
    const float* from = sums + (warp * kPixels + number % kPixels) * kPitch + column % kOutputs;
    Pack<float, 4> sum{};
    for (int deep = 0; deep < shape.deep; ++deep, from += shape.down * shape.across * kPixels * kPitch) {
      const auto part = *reinterpret_cast<const Pack<float, 4>*>(from);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.value[j] += part.value[j];
    }
    if (product.added.values != nullptr) {
      const int64_t at = product.added.at(pixel) + first_output + column;
      const auto added = *reinterpret_cast<const Pack<T, 4>*>(static_cast<const T*>(product.added.values) + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.value[j] += as_float(added.value[j]);
    }
    T* to = static_cast<T*>(product.out.values) + product.out.at(pixel) +
            (first_output + column) * product.out.channel_stride;
    if (product.out.vectors && count == 4) {
      Pack<T, 4> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) store(&four.value[j], sum.value[j]);
      *reinterpret_cast<Pack<T, 4>*>(to) = four;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < count) store(to + j * product.out.channel_stride, sum.value[j]);
    }
  }
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const __grid_constant__ Launch launch) {
  using Weights = Fragment<T, kColumns>;
  BCM_DYNAMIC_SHARED(float, sums_of_warps);  // then activated pixels [rows, pitch]
  constexpr int kPitch = kSumsPitch<kColumns>;
  T* const pixels = reinterpret_cast<T*>(sums_of_warps + kWarps * kPixels * kPitch);
  const Shape& shape = launch.shape;

  int which = 0;
  while (which + 1 < launch.products && blockIdx.x >= launch.product[which + 1].first_block) ++which;
  const Product& product = launch.product[which];
  const int64_t block = blockIdx.x - product.first_block, tiles_across = ceil_div(product.outputs, shape.outputs());
  const Tile tile(product, shape.pixels(), block / tiles_across);
  const int first_output = static_cast<int>(block % tiles_across) * shape.outputs();

  const int warp = threadIdx.x / 32, deep = warp / (shape.down * shape.across);
  const int down = warp / shape.across % shape.down, across = warp % shape.across;
  const int output = first_output + across * 4 * kColumns;
  const T* const weights = static_cast<const T*>(product.weights) + output;
  const T* const own = pixels + tile.row_of(down * kPixels + threadIdx.x % 32 / 4) * product.pitch;
  float* const to = sums_of_warps + (warp * kPixels + threadIdx.x % 32 / 4) * kPitch + threadIdx.x % 4 * kColumns;

  for (int begin = 0; begin < product.inner; begin += product.chunk) {
    const int end = smaller_of(begin + product.chunk, product.inner);
    if (begin > 0) __syncthreads();  // the chunk before has been read
    for (int part = begin / product.part_inner; part * product.part_inner < end; ++part) {
      const int first = part * product.part_inner;
      const int from = larger_of(begin - first, 0), until = smaller_of(end - first, product.part_inner);
      const Part& each = launch.part[product.first_part + part];
      if (each.vectors) {
        activate<true>(launch, each, tile, from, until, pixels + first - begin);
      } else {
        activate<false>(launch, each, tile, from, until, pixels + first - begin);
      }
    }
    Steps<Weights::kStep> steps(product, begin, end, deep, shape.deep);
    Weights next;
    const auto load = [&] {
      if (steps.left > 0) {
        next.load(weights + steps.weight_row() * product.outputs, product.outputs, product.channels - steps.channel,
                  product.outputs - output, product.weight_vectors);
      }
    };
    float sums[4][kColumns] = {};
    load();
    __syncthreads();
    while (steps.left > 0) {
      const Weights current = next;
      const T* const at = own + tile.row_of_tap(steps.tap) * product.pitch + steps.position;
      steps.advance();
      load();
      current.multiply(at, tile.row_step() * product.pitch, sums);
    }
    keep(sums, begin > 0, to);
  }
  __syncthreads();
  write<T, kColumns>(launch, tile, first_output, sums_of_warps);
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Pieces of one allocation.
struct Arena {
  char* base;
  int64_t bytes = 0;

  void* take(int64_t count) {
    void* piece = base + bytes;
    bytes += round_up(count, 256);
    return piece;
  }
};

// What stands between the launches: of the dtype of x.
struct Scratch {
  void* pooled;  // by pyramid_pool, channels last
  Map scaled[kMaxBranches], fused[kMaxBranches], shortcut;
};

// Whether `group` channels of a map, from a multiple of it, may be read or written at once.
bool in_vectors(const Map& map, int64_t channels, int64_t group, int64_t size) {
  return map.channel_stride == 1 && channels % group == 0 && map.batch_stride % group == 0 &&
         map.row_stride % group == 0 && map.column_stride % group == 0 &&
         is_aligned(map.values, smaller_of<int64_t>(group * size, 16));
}

// A map of scratch memory: channels last, padded for vectors.
Map dense(Arena& arena, const Pyramid& pyramid, int64_t height, int64_t width, int64_t channels, int64_t size) {
  const int64_t pitch = round_up(channels, kGroup);
  void* values = arena.take(pyramid.batch * height * width * pitch * size);
  return {values, static_cast<int>(height), static_cast<int>(width), height * width * pitch, 1, width * pitch, pitch,
          true};
}

class Module {
 public:
  Module(const Lmfm& call, void* memory) : call_(call), size_(size_of(call.dtype)) {
    Arena arena{static_cast<char*>(memory)};
    int64_t positions = 1;
    for (int i = 0; i < pyramid().pools; ++i) positions += pyramid().pool[i].height * pyramid().pool[i].width;
    scratch_.pooled = arena.take(pyramid().batch * pyramid().channels * positions * size_);
    for (int i = 0; i < call.branches; ++i) {
      const Map source = unscaled(i);
      scratch_.scaled[i] = dense(arena, pyramid(), source.height, source.width, call.breadth, size_);
      scratch_.fused[i] = scratch_.scaled[i];
      if (call.kernel[i] > 0)
        scratch_.fused[i] = dense(arena, pyramid(), pyramid().height, pyramid().width, call.breadth, size_);
    }
    if (call.shortcut != nullptr)
      scratch_.shortcut = dense(arena, pyramid(), pyramid().height, pyramid().width, call.outputs, size_);
    bytes_ = arena.bytes;
  }

  int64_t bytes() const { return bytes_; }

  template <typename T>
  int run(void* stream) const {
    const PyramidPool pools{pyramid(), call_.dtype, true, const_cast<void*>(call_.x), call_.batch_stride,
                            call_.channel_stride, call_.row_stride, call_.column_stride, scratch_.pooled};
    if (const int error = pyramid_pool_cuda(&pools, stream)) return error;
    if (const int error = launch<T>(scale(), stream)) return error;
    for (int depth = 1; depth <= call_.branches; ++depth)
      if (const int error = launch<T>(process(depth), stream)) return error;
    return launch<T>(compression(), stream);
  }

 private:
  const Pyramid& pyramid() const { return call_.pyramid; }
  int height() const { return static_cast<int>(pyramid().height); }
  int width() const { return static_cast<int>(pyramid().width); }

  Map x() const {
    Map map{const_cast<void*>(call_.x), height(), width(), call_.batch_stride, call_.channel_stride, call_.row_stride,
            call_.column_stride, false};
    map.vectors = in_vectors(map, pyramid().channels, kGroup, size_);
    return map;
  }
  Map out() const {
    Map map{call_.out, height(), width(), call_.out_batch_stride, call_.out_channel_stride, call_.out_row_stride,
            call_.out_column_stride, false};
    map.vectors = in_vectors(map, call_.outputs, 4, size_);
    return map;
  }

  // What a branch's first 1x1 reads: x, or one of the pooled maps that lie one after the other.
  Map unscaled(int branch) const {
    const int number = branch - (call_.branches - pyramid().pools - 1);
    if (number < 0) return x();
    int64_t before = 0, height = 1, width = 1;
    for (int i = 0; i < number; ++i) before += pyramid().pool[i].height * pyramid().pool[i].width;
    if (number < pyramid().pools) height = pyramid().pool[number].height, width = pyramid().pool[number].width;
    const int64_t channels = pyramid().channels;
    char* values = static_cast<char*>(scratch_.pooled) + before * pyramid().batch * channels * size_;
    Map map{values, static_cast<int>(height), static_cast<int>(width), height * width * channels, 1, width * channels,
            channels, false};
    map.vectors = in_vectors(map, channels, kGroup, size_);
    return map;
  }

  const void* at(const void* weights, int64_t elements) const {
    return static_cast<const char*>(weights) + elements * size_;
  }
  void add_part(Launch& launch, int64_t channels, int64_t norm, const Map& first, const Map& second = {}) const {
    const float* norms = call_.norms + norm;
    const bool vectors = first.vectors && (second.values == nullptr || second.vectors) && channels % kGroup == 0 &&
                         is_aligned(norms, 16) && call_.norm_stride % 4 == 0;
    launch.part[launch.parts++] = {{first, second}, norms, vectors};
  }
  int64_t scale_norms() const { return call_.branches * pyramid().channels; }
  int64_t process_norms() const {
    int64_t norms = 0;
    for (int i = 0; i < call_.branches; ++i) norms += call_.kernel[i] > 0 ? call_.breadth : 0;
    return norms;
  }

  // After how many launches of fusing convolutions a branch is done.
  int depth(int branch) const {
    if (call_.kernel[branch] == 0) return 0;
    return call_.receives[branch] < 0 ? 1 : 1 + depth(call_.receives[branch]);
  }

  void add(Launch& launch, const void* weights, int side, int64_t channels, int64_t outputs, const Map& out,
           const Map& added = {}) const {
    const int64_t first = launch.products == 0 ? 0 : launch.product[launch.products - 1].first_part +
                                                         launch.product[launch.products - 1].parts;
    Product& product = launch.product[launch.products++];
    product.weights = weights, product.side = side, product.channels = static_cast<int>(channels);
    product.outputs = static_cast<int>(outputs);
    product.weight_vectors = outputs % 4 == 0 && is_aligned(weights, 4 * size_);
    product.first_part = static_cast<int>(first), product.parts = launch.parts - product.first_part;
    product.part_inner = static_cast<int>(round_up(channels, kAlign));
    product.inner = product.parts * product.part_inner;
    product.batch = pyramid().batch, product.out = out, product.added = added;
  }

  Launch scale() const {
    const int64_t channels = pyramid().channels, breadth = call_.breadth;
    Launch launch{};
    if (call_.shortcut != nullptr) {
      add_part(launch, channels, scale_norms() + process_norms() + call_.branches * breadth, x());
      add(launch, call_.shortcut, 1, channels, call_.outputs, scratch_.shortcut);
    }
    for (int i = 0; i < call_.branches; ++i) {
      add_part(launch, channels, i * channels, unscaled(i));
      add(launch, at(call_.scale, i * channels * breadth), 1, channels, breadth, scratch_.scaled[i]);
    }
    return launch;
  }

  Launch process(int wanted) const {
    const int64_t breadth = call_.breadth;
    Launch launch{};
    int64_t taps = 0, norms = scale_norms();
    for (int i = 0; i < call_.branches; ++i) {
      if (call_.kernel[i] == 0) continue;
      if (depth(i) == wanted) {
        const Map received = call_.receives[i] < 0 ? Map{} : scratch_.fused[call_.receives[i]];
        add_part(launch, breadth, norms, scratch_.scaled[i], received);
        add(launch, at(call_.process, taps * breadth * breadth), call_.kernel[i], breadth, breadth, scratch_.fused[i]);
      }
      taps += call_.kernel[i] * call_.kernel[i], norms += breadth;
    }
    return launch;
  }

  Launch compression() const {
    Launch launch{};
    const int64_t norms = scale_norms() + process_norms();
    for (int i = 0; i < call_.branches; ++i)
      add_part(launch, call_.breadth, norms + i * call_.breadth, scratch_.fused[i]);
    add(launch, call_.compression, 1, call_.breadth, call_.outputs, out(), scratch_.shortcut);
    return launch;
  }

  // Number the blocks of all products; how many there are.
  static int64_t assign_blocks(Launch& launch) {
    const Shape& shape = launch.shape;
    int64_t blocks = 0;
    for (int i = 0; i < launch.products; ++i) {
      Product& product = launch.product[i];
      const int64_t pixels = product.batch * product.out.height * product.out.width;
      const int64_t patches = product.batch * ceil_div(product.out.width, kPatch) *
                              ceil_div(product.out.height, shape.pixels() / kPatch);
      product.first_block = blocks;
      blocks += (product.side > 1 ? patches : ceil_div(pixels, shape.pixels())) *
                ceil_div(product.outputs, shape.outputs());
    }
    return blocks;
  }

  // Lay out shared memory: as few and even chunks of the inner dimension as fit. Rows of activated pixels lie so that
  // lanes that read neighbours meet other banks: 64 bytes further (16 for float32) modulo 128.
  int64_t assign_chunks(Launch& launch) const {
    const int pitch = launch.shape.columns == 8 ? kSumsPitch<8> : kSumsPitch<4>;
    const int64_t sums = int64_t{kWarps} * kPixels * pitch * 4;
    int64_t bytes = 0;
    for (int i = 0; i < launch.products; ++i) {
      Product& product = launch.product[i];
      const int64_t pixels = launch.shape.pixels(), gap = size_ == 2 ? 32 : 4;
      const int64_t rows = product.side > 1 ? (pixels / kPatch + 2) * kHalo : pixels;
      const int64_t most = ((kShared - sums) / (rows * size_) - gap) / 64 * 64;
      product.chunk = static_cast<int>(round_up(ceil_div(product.inner, ceil_div(product.inner, most)), 64));
      product.pitch = product.chunk + static_cast<int>(gap);
      bytes = larger_of(bytes, rows * product.pitch * size_);
    }
    return sums + bytes;
  }

  template <typename T>
  int launch(Launch launch, void* stream) const {
    if (launch.products == 0) return 0;
    launch.norm_stride = call_.norm_stride;
    int64_t blocks = 0;
    for (const Shape& shape : kShapes) {
      launch.shape = shape;
      blocks = assign_blocks(launch);
      if (blocks >= kBlocks) break;
    }
    const auto kernel = launch.shape.columns == 8 ? product_kernel<T, 8> : product_kernel<T, 4>;
    const int64_t bytes = assign_chunks(launch);
    if (bytes > kSharedUnasked) {
      const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
      BCM_TRY(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(bytes)));
    }
    BCM_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(bytes), stream, launch);
    return cudaGetLastError();
  }

  const Lmfm& call_;
  const int64_t size_;
  Scratch scratch_{};
  int64_t bytes_;
};

}  // namespace
}  // namespace bcmfnet

extern "C" int64_t lmfm_scratch_bytes_cuda(const bcmfnet::Lmfm* call) {
  return bcmfnet::Module(*call, nullptr).bytes();
}

extern "C" int lmfm_cuda(const bcmfnet::Lmfm* call, void* scratch, void* stream) {
  using namespace bcmfnet;
  const Module module(*call, scratch);
  switch (call->dtype) {
    case DType::kFloat16: return module.run<__half>(stream);
    case DType::kBFloat16: return module.run<__nv_bfloat16>(stream);
    default: return module.run<float>(stream);
  }
}
