// Several matrix products in one launch: of pixels, whose channels are read through upsampling, sum, norm and ReLU
// ("activated"), with weights.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"
#include "lmfm/lmfm.h"

namespace bcmfnet {

constexpr int kGroup = 8;  // A thread activates at most so many channels at a time: 16 bytes of 16-bit numbers.
constexpr int kPixels = 32;  // of a warp's tile
constexpr int kMostGemms = kMaxBranches + 1;

struct Pixel {
  int image, y, x;
  bool inside = true;  // of the map
};

// Values [batch, channels, height, width]. It is a View in the integers of a block: a division of 64-bit integers costs
// dozens of instructions. An axis along which there is one value may have the size of the result, and a stride of 0.
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
  Norms norm;
  bool vectors;  // all of it can be read kGroup channels at a time
  int smaller;   // The first so many maps are smaller than the result.
};

// Where a pixel finds its source pixels in a map. An axis that keeps its size is copied.
struct Place {
  int64_t at;         // of the upper left one, or -1: the pixel is outside
  int across, below;  // elements to the right one and to the lower one; 0 where there are none
  float right, down;  // their weights
};

// out = convolution of some parts + added. Weights are [parts, side * side, channels, outputs].
struct Gemm {
  unsigned first_block;  // of the launch
  unsigned blocks_across, patches_across, patches_down;  // of the outputs, and of an image's pixels if side > 1
  const void* weights;
  bool weight_vectors;  // rows of weights are aligned for vectors
  int first_part, parts, maps;      // `maps` of each part
  int side;                         // of the convolution, 1 or 3
  int channels, part_inner, inner;  // of a part, with padding, and of all parts
  int chunk, pitch;                 // of `inner` that is in shared memory at once, and from pixel to pixel there
  int outputs;
  int64_t batch;
  Map out, added;
};

// How a block's warps divide a tile: `down` times its pixels, `across` its outputs, `deep` its inner dimension, all to
// base 2. A lane has 4 pixels and `columns` outputs.
struct Shape {
  int columns, down, across, deep;

  __host__ __device__ int pixels() const { return kPixels << down; }
  __host__ __device__ int outputs() const { return 4 * columns << across; }
};

struct Gemms {
  Part part[kMostGemms];
  Gemm gemm[kMostGemms];
  int parts, count;
  Shape shape;        // launch_gemms chooses it, and lays out blocks and shared memory.
  int places_bytes;  // of shared memory

  // Add a part of the next product.
  void add(const Map& first, const Map& second, const Norms& norm, int64_t channels);

  // Add the product of the parts that have been added since the last one.
  void add(DType dtype, const void* weights, int side, int64_t channels, int64_t outputs, int64_t batch, const Map& out,
           const Map& added);
};

// Returns a cudaError_t. `dtype` is that of maps and weights.
int launch_gemms(DType dtype, Gemms gemms, void* stream);

}  // namespace bcmfnet
