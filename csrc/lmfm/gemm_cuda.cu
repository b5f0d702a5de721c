// A block activates its pixels and their neighbours once, to shared memory; its warps then take parts of the inner
// dimension, read weights straight from global memory (no two of them the same), and their sums are added in a fixed
// order.
//
// Why so: one image of 16x32 has 512 pixels and 128 outputs, and an H200 132 multiprocessors. A tile of 32x32, or 32x16
// where even that leaves less than a block for each of them, has no more than one warp's sums; eight warps that divide
// the inner dimension keep enough loads under way.
#include "lmfm/gemm_cuda.h"

#include <utility>

#include "common/cuda/grid.h"
#include "lmfm/activate_cuda.h"

namespace bcmfnet {
namespace {

constexpr int kAlign = 32;    // The channels of each part of the inner dimension are padded to a multiple of this.
constexpr int kBlocks = 120;  // So many are wanted at once: about one for each multiprocessor of an H200.
constexpr Shape kShapes[] = {{8, 2, 1, 0}, {8, 1, 1, 1}, {8, 0, 0, 3}, {4, 0, 0, 3}};

__device__ uint32_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ uint32_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

// Weights of one step along the inner dimension that a lane holds, and the product of a warp with them. With
// g = lane / 4 and t = lane % 4, a lane has the sums of the pixels g + 8 i and the outputs kColumns * t + j. A step of
// 32 is two of the tensor core's: the order of outputs is free, and chosen so that a lane finds its kColumns / 2 ones of
// a row of weights side by side.
template <typename T, int kColumns>
struct Fragment {
  static constexpr int kStep = 32, kEach = kColumns / 2;
  Pack<uint32_t, kEach / 2> row[8];

  // A lane's pixel and inner position that multiply() starts from.
  __device__ static int pixel() { return threadIdx.x % 16; }
  __device__ static int position() { return threadIdx.x % 32 / 16 * 8; }

  // From the step's first row and the warp's first output; `rows` and `columns` are left from there.
  __device__ void load(const T* weights, int64_t outputs, int rows, int columns, bool vectors) {
    const int first = threadIdx.x % 4 * 2, column = threadIdx.x % 32 / 4 * kEach;
    weights += first * outputs + column;
    if (vectors && rows >= kStep && columns >= 4 * kColumns) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        row[i] = *reinterpret_cast<const Pack<uint32_t, kEach / 2>*>(weights + (i / 2 * 8 + i % 2) * outputs);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const T* from = weights + (i / 2 * 8 + i % 2) * outputs;
      const int count = first + i / 2 * 8 + i % 2 < rows ? columns - column : 0;
#pragma unroll
      for (int j = 0; j < kEach; j += 2) {
        const uint32_t low = j < count ? bits_of(from[j]) : 0, high = j + 1 < count ? bits_of(from[j + 1]) : 0;
        row[i].value[j / 2] = low | high << 16;
      }
    }
  }

  // The same in the order of the tensor core: for each of its two steps and each output, four inner positions.
  struct Ordered {
    uint32_t pairs[2][kEach][2];

    // `pixels` is the lane's place there; eight pixels further are `step` elements.
    __device__ void multiply(const T* pixels, int step, float (&sums)[4][kColumns]) const {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          uint32_t a[4];
          load_operand(a, pixels + i * step + 16 * half);
#pragma unroll
          for (int j = 0; j < kEach; ++j) {
            float c[4] = {sums[i][j], sums[i][kEach + j], sums[i + 1][j], sums[i + 1][kEach + j]};
            multiply_add<T>(c, a, pairs[half][j]);
            sums[i][j] = c[0], sums[i][kEach + j] = c[1], sums[i + 1][j] = c[2], sums[i + 1][kEach + j] = c[3];
          }
        }
      }
    }
  };

  __device__ Ordered ordered() const {
    Ordered result;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kEach; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 4 * half + 2 * i;
          result.pairs[half][j][i] =
              __byte_perm(row[at].value[j / 2], row[at + 1].value[j / 2], j % 2 == 0 ? 0x5410 : 0x7632);
        }
    return result;
  }
};

template <int kColumns>
struct Fragment<float, kColumns> {
  static constexpr int kStep = 16 / kColumns;
  float row[kStep][kColumns];

  __device__ static int pixel() { return threadIdx.x % 32 / 4; }
  __device__ static int position() { return 0; }

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

  using Ordered = Fragment;
  __device__ Ordered ordered() const { return *this; }

  __device__ void multiply(const float* pixels, int step, float (&sums)[4][kColumns]) const {
    Pack<float, kStep> a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const Pack<float, kStep>*>(pixels + i * step);
#pragma unroll
    for (int k = 0; k < kStep; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[i][j] = fmaf(a[i].value[k], row[k][j], sums[i][j]);
  }
};

// A warp's steps through the taps and a chunk [begin, end) of the inner dimension: one of 2^deep even parts of them.
template <int kStep>
struct Steps {
  const Gemm& gemm;
  const int begin, length;
  int left, tap;
  int position, part, channel;  // in the chunk; the part that this is, and the channel of it

  __device__ Steps(const Gemm& gemm, int begin, int end, int warp, int deep)
      : gemm(gemm), begin(begin), length(end - begin), tap(0) {
    const int each = length / kStep, all = each * gemm.side * gemm.side;
    int first = all * warp >> deep;
    left = (all * (warp + 1) >> deep) - first;
    if (gemm.side > 1) tap = first / each, first -= tap * each;
    go_to(first * kStep);
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
    position = to, part = 0, channel = begin + to;
    if (gemm.parts > 1) part = channel / gemm.part_inner, channel -= part * gemm.part_inner;
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
      Pack<float, 4> sum;
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.value[k] = sums[i][j + k];
      if (adds) {
        const Pack<float, 4> before = four;
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.value[k] += before.value[k];
      }
      four = sum;
    }
  }
}

// The sums of a block's tile over its warps, and what is added, to where they belong.
template <typename T, int kColumns>
__device__ void write(
    const Gemm& gemm, const Shape& shape, const int64_t* results, int first_output, const float* sums) {
  constexpr int kPitch = kSumsPitch<kColumns>, kOutputs = 4 * kColumns;
  const bool along = gemm.out.channel_stride == 1;
  const int pixels = shape.pixels();
  const int lanes = along ? shape.across + (kColumns == 8 ? 3 : 2) : shape.down + 5;  // to base 2
  for (int i = threadIdx.x; i < pixels * shape.outputs() / 4; i += kThreads) {
    const int inner = i & ((1 << lanes) - 1), outer = i >> lanes;
    const int number = along ? outer : inner, column = 4 * (along ? inner : outer);
    const int64_t at = results[number];
    const int count = smaller_of(gemm.outputs - first_output - column, 4);
    if (at < 0 || count <= 0) continue;
    const int warp = (number / kPixels << shape.across) + column / kOutputs;
    const float* from = sums + (warp * kPixels + number % kPixels) * kPitch + column % kOutputs;
    auto sum = *reinterpret_cast<const Pack<float, 4>*>(from);
    for (int deep = 1; deep < 1 << shape.deep; ++deep) {
      from += kPixels * kPitch << (shape.down + shape.across);
      const auto part = *reinterpret_cast<const Pack<float, 4>*>(from);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.value[j] += part.value[j];
    }
    if (gemm.added.values != nullptr) {
      const T* add = static_cast<const T*>(gemm.added.values) + results[pixels + number] + first_output + column;
      const auto added = *reinterpret_cast<const Pack<T, 4>*>(add);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.value[j] += as_float(added.value[j]);
    }
    T* to = static_cast<T*>(gemm.out.values) + at + (first_output + column) * gemm.out.channel_stride;
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
  BCM_DYNAMIC_SHARED(float, sums_of_warps);  // then places, then activated pixels [rows, pitch]
  constexpr int kPitch = kSumsPitch<kColumns>;
  char* const memory = reinterpret_cast<char*>(sums_of_warps + kWarps * kPixels * kPitch);
  T* const pixels = reinterpret_cast<T*>(memory + launch.places_bytes);
  const Shape& shape = launch.shape;

  int which = 0;
  while (which + 1 < launch.count && blockIdx.x >= launch.gemm[which + 1].first_block) ++which;
  const Gemm& gemm = launch.gemm[which];
  const unsigned block = blockIdx.x - gemm.first_block, number = block / gemm.blocks_across;
  const Tile tile{gemm, shape.pixels(), number};
  const int first_output = static_cast<int>(block - number * gemm.blocks_across) * shape.outputs();
  const int rows = tile.rows();
  const Places places(memory, gemm, rows);
  places.fill(launch, tile);
  __syncthreads();

  const int warp = threadIdx.x / 32, deep = warp >> (shape.down + shape.across);
  const int down = warp >> shape.across & ((1 << shape.down) - 1), across = warp & ((1 << shape.across) - 1);
  const int output = first_output + across * 4 * kColumns;
  const T* const weights = static_cast<const T*>(gemm.weights) + output;
  const T* const own = pixels + tile.row_of(down * kPixels + Weights::pixel()) * gemm.pitch + Weights::position();
  const int step = tile.row_step() * gemm.pitch;
  float* const to = sums_of_warps + (warp * kPixels + threadIdx.x % 32 / 4) * kPitch + threadIdx.x % 4 * kColumns;

  int part = 0, from = 0;  // that the chunk begins with
  for (int begin = 0; begin < gemm.inner; begin += gemm.chunk) {
    const int end = smaller_of(begin + gemm.chunk, gemm.inner);
    if (begin > 0) __syncthreads();  // the chunk before has been read
    for (int position = begin; position < end;) {
      const int until = smaller_of(from + end - position, gemm.part_inner);
      activate(gemm, launch.part[gemm.first_part + part], places.parts + part * gemm.maps * rows, rows, from, until,
               pixels + position - begin - from);
      position += until - from, from = until;
      if (from == gemm.part_inner) from = 0, ++part;
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
      const typename Weights::Ordered current = next.ordered();
      const T* const at = own + tile.row_of_tap(steps.tap) * gemm.pitch + steps.position;
      steps.advance();
      load();
      current.multiply(at, step, sums);
    }
    keep(sums, begin > 0, to);
  }
  __syncthreads();
  write<T, kColumns>(gemm, shape, places.results, first_output, sums_of_warps);
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
    gemm.first_block = static_cast<unsigned>(blocks);
    gemm.blocks_across = blocks_for(gemm.outputs, shape.outputs());
    gemm.patches_across = blocks_for(gemm.out.width, kPatch);
    gemm.patches_down = blocks_for(gemm.out.height, shape.pixels() / kPatch);
    const int64_t patches = gemm.batch * gemm.patches_across * gemm.patches_down;
    blocks += (gemm.side > 1 ? patches : ceil_div(pixels, shape.pixels())) * gemm.blocks_across;
  }
  return blocks;
}

int64_t rows_of(const Gemm& gemm, const Shape& shape) {
  return gemm.side > 1 ? (shape.pixels() / kPatch + 2) * kHalo : shape.pixels();
}

// Lays out shared memory: as few and even chunks of the inner dimension as fit. Rows of activated pixels lie so that
// lanes that read 16 bytes of neighbours meet other banks: 16 bytes further modulo 128. Returns its bytes.
int64_t assign_chunks(Gemms& launch, int64_t size) {
  const Shape& shape = launch.shape;
  const int64_t sums = int64_t{kWarps} * kPixels * (shape.columns == 8 ? kSumsPitch<8> : kSumsPitch<4>) * 4;
  int64_t places = 0;
  for (int i = 0; i < launch.count; ++i) {
    const Gemm& gemm = launch.gemm[i];
    places = larger_of<int64_t>(places, rows_of(gemm, shape) * gemm.parts * gemm.maps * sizeof(Place));
  }
  places = round_up(places + 2 * shape.pixels() * sizeof(int64_t), 16);
  launch.places_bytes = static_cast<int>(places);
  int64_t bytes = 0;
  for (int i = 0; i < launch.count; ++i) {
    Gemm& gemm = launch.gemm[i];
    const int64_t rows = rows_of(gemm, shape), gap = 16 / size;
    const int64_t most = ((kMostShared - sums - places) / (rows * size) - gap) / 64 * 64;
    gemm.chunk = static_cast<int>(round_up(ceil_div(gemm.inner, ceil_div(gemm.inner, most)), 64));
    gemm.pitch = gemm.chunk + static_cast<int>(gap);
    bytes = larger_of(bytes, rows * gemm.pitch * size);
  }
  return sums + places + bytes;
}

// An axis along which there is one value has the same one everywhere.
Map stretched(Map map, const Map& out) {
  if (map.width == 1) map.width = out.width, map.column_stride = 0;
  if (map.height == 1) map.height = out.height, map.row_stride = 0;
  return map;
}

bool is_smaller(const Map& map, const Map& out) {
  return map.values != nullptr && (map.width != out.width || map.height != out.height);
}

}  // namespace

void Gemms::add(const Map& first, const Map& second, const Norms& norm, int64_t channels) {
  const bool vectors = first.vectors && (second.values == nullptr || second.vectors) && channels % kGroup == 0 &&
                       is_aligned(norm.multipliers, 16) && is_aligned(norm.shifts, 16);
  part[parts++] = {{first, second}, norm, vectors, 0};
}

void Gemms::add(
    DType dtype, const void* weights, int side, int64_t channels, int64_t outputs, int64_t batch, const Map& out,
    const Map& added) {
  Gemm& next = gemm[count];
  next.weights = weights, next.side = side, next.channels = static_cast<int>(channels);
  next.outputs = static_cast<int>(outputs);
  next.weight_vectors = outputs % 4 == 0 && is_aligned(weights, 4 * size_of(dtype));
  next.first_part = count == 0 ? 0 : gemm[count - 1].first_part + gemm[count - 1].parts;
  next.parts = parts - next.first_part, next.maps = 1;
  for (int i = next.first_part; i < parts; ++i) {
    Map(&map)[2] = part[i].map;
    for (Map& each : map) each = stretched(each, out);
    if (is_smaller(map[1], out) && !is_smaller(map[0], out)) std::swap(map[0], map[1]);
    part[i].smaller = is_smaller(map[0], out) + is_smaller(map[1], out);
    if (map[1].values != nullptr) next.maps = 2;
  }
  next.part_inner = static_cast<int>(round_up(channels, kAlign));
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
