// One row of the result at a time, of three rows of the image: these are normalised once, into four values to a pixel,
// the last of them 0, with zeros around. So what a tap multiplies lies at distances that the compiler knows, and AMX
// takes a tile of 16 pixels from where they lie.
#include "stem_conv/stem_conv_cpu.h"

#include "common/amx.h"
#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"

namespace bcmfnet::BCM_ISA {
namespace {

constexpr int kPixel = 4;              // values of a pixel
constexpr int kPixels = 16;            // that are read at once
constexpr int kTogether = 2 * kLanes;  // channels that are computed at once
constexpr int kGroup = 32;             // pixels of the result, and channels, that AMX computes at once

typedef float Pixel __attribute__((vector_size(4 * kPixel)));

struct UInt8 {
  using Element = uint8_t;
  typedef Byte Vector;
  static Float widen(Byte value) {  // by way of shorts: GCC converts bytes to integers one by one
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(value, Short), Int), Float);
  }
};

// The image by normalised rows of Type.
template <typename Type>
class Rows {
 public:
  using Element = typename Type::Element;

  Rows(const StemConv& call, Arena& arena)
      : call_(call), plane_(round_up(call.images.width, kPixels)),
        elements_(kPixel * (2 * round_up(call.out.width, kGroup) + 1 + 2 * kPixels)),
        planes_(arena.take<float>(3 * plane_)), zeros_(arena.take<Element>(elements_)) {
    for (auto& row : held_) row.values = arena.take<Element>(elements_);
    for (int i = 0; i < kLanes; ++i) {
      const int channel = i % kPixel;
      scale_[i] = channel < 3 ? call.scale[channel] : 0;
      shift_[i] = channel < 3 ? call.shift[channel] : 0;
    }
    if (zeros_ == nullptr) return;
    std::memset(zeros_, 0, sizeof(Element) * elements_);
    for (const auto& row : held_) std::memset(row.values, 0, sizeof(Element) * elements_);
  }

  // Row y of an image, from the zeros to its left on; y may be that of the row above the image or below it.
  const Element* operator()(int64_t image, int64_t y) {
    if (y < 0 || y >= call_.images.height) return zeros_;
    Held& row = held_[y % 3];
    if (row.image != image || row.y != y) read(image, y, row.values + kPixel);
    row.image = image, row.y = y;
    return row.values;
  }

 private:
  struct Held {
    Element* values;
    int64_t image = -1, y = -1;
  };

  void read(int64_t image, int64_t y, Element* to) const {
    const int64_t at = offset_of(call_.images, image, 0, y);
    if (call_.images.dtype == DType::kUInt8) return read<UInt8>(at, to);
    dispatch_float(call_.images.dtype, [&](auto type) { read<decltype(type)>(at, to); });
  }

  template <typename From>
  void read(int64_t at, Element* to) const {
    const int64_t pitch = call_.images.column_stride;
    const bool has_pixels = call_.images.channel_stride == 1 && (pitch == 3 || pitch == 4);
    read_planes<From>(at, has_pixels ? read_pixels<From>(at, to) : 0, to);
  }

  // Pixels whose channels are neighbours, a vector at a time; returns how many were read before one leaves the row.
  template <typename From>
  int64_t read_pixels(int64_t at, Element* to) const {
    const int64_t pitch = call_.images.column_stride, end = (call_.images.width - 1) * pitch + 3;
    const auto* const from = static_cast<const typename From::Element*>(call_.images.data) + at;
    const Int lane = lane_numbers(), channel = lane % kPixel;
    const Int order = lane / kPixel * static_cast<int32_t>(pitch) + (channel < 3 ? channel : 0), there = channel < 3;
    int64_t x = 0;
    for (; x * pitch + kLanes <= end; x += kLanes / kPixel) {
      const Float pixels = permute(From::widen(load<typename From::Vector>(from + x * pitch)), order);
      put(float_of(bits_of(pixels) & there), to + x * kPixel);
    }
    return x;
  }

  // Pixels from `first` on, one channel after the other.
  template <typename From>
  void read_planes(int64_t at, int64_t first, Element* to) const {
    const View& images = call_.images;
    for (int c = 0; c < 3; ++c) {
      const int64_t begin = at + c * images.channel_stride + first * images.column_stride;
      const auto* const from = static_cast<const typename From::Element*>(images.data) + begin;
      read_plane<From>(from, images.column_stride, images.width - first, planes_ + c * plane_);
    }
    for (int64_t x = first; x < images.width; x += kPixels) {
      const float* const from = planes_ + (x - first);
      alignas(64) float pixels[kPixels * kPixel];
      for (int i = 0; i < kPixels; ++i) {
        const Pixel pixel{from[i], from[plane_ + i], from[2 * plane_ + i], 0};
        std::memcpy(pixels + i * kPixel, &pixel, sizeof(pixel));
      }
      for (int i = 0; i < kPixels * kPixel; i += kLanes) put(load<Float>(pixels + i), to + x * kPixel + i);
    }
    clear_from(images.width, to);
  }

  void put(Float pixels, Element* to) const { store(to, Type::narrow(pixels * scale_ + shift_), kLanes); }

  // What was written beyond the image.
  void clear_from(int64_t x, Element* to) const { std::memset(to + x * kPixel, 0, sizeof(Element) * kPixels * kPixel); }

  const StemConv& call_;
  const int64_t plane_, elements_;
  float* planes_;
  Element* zeros_;
  Held held_[3];
  Float scale_, shift_;  // of the values of pixels
};

// Weights and bias as floats, by blocks of channels that are computed at once; those beyond the last one are zeros.
struct Weights {
  float *taps, *bias;  // [blocks, kTaps, kTogether], [blocks, kTogether]

  Weights(const StemConv& call, Arena& arena) {
    const int64_t channels = round_up(call.out.channels, kTogether);
    taps = arena.take<float>(kTaps * channels), bias = arena.take<float>(channels);
  }

  template <typename Type>
  void read(const StemConv& call) const {
    const auto value_at = [](const void* from, int64_t at) {
      return read_some<Type>(static_cast<const typename Type::Element*>(from) + at, 1, 1)[0];
    };
    for (int64_t c = 0; c < round_up(call.out.channels, kTogether); ++c) {
      const bool there = c < call.out.channels;
      bias[c] = there ? value_at(call.bias, c) : 0;
      float* const to = taps + c / kTogether * kTaps * kTogether + c % kTogether;
      for (int tap = 0; tap < kTaps; ++tap)
        to[tap * kTogether] = there ? value_at(call.weight.data, tap_of(call.weight, c, tap)) : 0;
    }
  }
};

Float relu(Float value) { return larger(value, fill(0.0f)); }  // keeps NaN

// float32 arithmetic on any processor: kHeld pixels of the result stay in registers.
template <typename Type>
struct Vectors {
  using Element = typename Type::Element;
  // 24 of 32 vector registers, or 12 of 16.
  static constexpr int kHeld = kLanes == 16 ? 12 : 6;

  const StemConv& call;
  Weights weights;
  Rows<Float32> rows;

  Vectors(const StemConv& call, Arena& arena) : call(call), weights(call, arena), rows(call, arena) {}
  void begin() const { weights.template read<Type>(call); }
  void end() const {}

  void write_row(int64_t image, int64_t y, Element* out) {
    const float* const three[3] = {rows(image, 2 * y - 1), rows(image, 2 * y), rows(image, 2 * y + 1)};
    for (int64_t c = 0; c < call.out.channels; c += kTogether)
      for (int64_t x = 0; x < call.out.width; x += kHeld)
        multiply(three, x, c, out + x * call.out.column_stride + c);
  }

  void multiply(const float* const* rows, int64_t x, int64_t channel, Element* out) const {
    const float *weight = weights.taps + channel * kTaps, *bias = weights.bias + channel;
    Float left[kHeld], right[kHeld];
    for (int p = 0; p < kHeld; ++p) left[p] = load<Float>(bias), right[p] = load<Float>(bias + kLanes);
    for (int ky = 0; ky < 3; ++ky)
      for (int kx = 0; kx < 3; ++kx)
        for (int c = 0; c < 3; ++c, weight += kTogether) {
          const float* const from = rows[ky] + (2 * x + kx) * kPixel + c;
          const Float first = load<Float>(weight), second = load<Float>(weight + kLanes);
#pragma GCC unroll 12
          for (int p = 0; p < kHeld; ++p) {
            left[p] += from[2 * p * kPixel] * first;
            right[p] += from[2 * p * kPixel] * second;
          }
        }
    const int64_t channels = call.out.channels - channel;
    for (int p = 0; p < kHeld && x + p < call.out.width; ++p, out += call.out.column_stride) {
      write_some<Type>(out, 1, relu(left[p]), channels);
      if (channels > kLanes) write_some<Type>(out + kLanes, 1, relu(right[p]), channels - kLanes);
    }
  }
};

#if defined(BCM_AMX)

// bfloat16 products with float32 sums: 32 pixels by 32 channels stay in the unit.
struct Tiles {
  using Element = uint16_t;
  static constexpr int kTile = 16;               // pixels, and channels, of a tile
  static constexpr int kPairs = 3 * kPixel / 2;  // 32-bit values that a pixel of the result reads of a row

  const StemConv& call;
  Weights weights;
  Rows<BFloat16> rows;
  uint32_t* packed;  // [blocks, 3, kPairs, kGroup]: pairs of taps of a row; a pixel's fourth value has the weight 0
  float* sums;       // [kGroup, kGroup]

  Tiles(const StemConv& call, Arena& arena) : call(call), weights(call, arena), rows(call, arena) {
    packed = arena.take<uint32_t>(round_up(call.out.channels, kGroup) * 3 * kPairs);
    sums = arena.take<float>(kGroup * kGroup);
  }

  void begin() const {
    weights.read<BFloat16>(call);
    const auto bits = [&](int64_t block, int ky, int value, int column) -> uint32_t {
      if (value % kPixel == 3) return 0;
      const int tap = 9 * ky + value / kPixel * 3 + value % kPixel;
      return static_cast<uint32_t>(bits_of(fill(weights.taps[(block * kTaps + tap) * kTogether + column]))[0]) >> 16;
    };
    uint32_t* to = packed;
    for (int64_t block = 0; block < ceil_div(call.out.channels, kGroup); ++block)
      for (int ky = 0; ky < 3; ++ky)
        for (int pair = 0; pair < kPairs; ++pair)
          for (int column = 0; column < kGroup; ++column)
            *to++ = bits(block, ky, 2 * pair, column) | bits(block, ky, 2 * pair + 1, column) << 16;
    AmxShapes shapes;
    for (int tile = 0; tile < 4; ++tile) shapes.set(tile, kTile, 64);
    for (int tile = 4; tile < 6; ++tile) shapes.set(tile, kTile, 4 * kPairs);
    for (int tile = 6; tile < 8; ++tile) shapes.set(tile, kPairs, 64);
    shapes.load();
  }
  __attribute__((target("amx-tile"))) void end() const { _tile_release(); }

  void write_row(int64_t image, int64_t y, Element* out) {
    const uint16_t* const three[3] = {rows(image, 2 * y - 1), rows(image, 2 * y), rows(image, 2 * y + 1)};
    for (int64_t c = 0; c < call.out.channels; c += kGroup)
      for (int64_t x = 0; x < call.out.width; x += kGroup) {
        multiply(three, x, c);
        write(x, c, out + x * call.out.column_stride + c);
      }
  }

  __attribute__((target("amx-tile,amx-bf16"))) void multiply(
      const uint16_t* const* three, int64_t x, int64_t channel) const {
    constexpr int kRowBytes = 2 * 2 * kPixel, kTileElements = kTile * 2 * kPixel;
    const uint32_t* weight = packed + channel * 3 * kPairs;
    asm volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int ky = 0; ky < 3; ++ky, weight += kPairs * kGroup) {
      const uint16_t* const from = three[ky] + 2 * x * kPixel;
      _tile_loadd(4, from, kRowBytes);
      _tile_loadd(5, from + kTileElements, kRowBytes);
      _tile_loadd(6, weight, 4 * kGroup);
      _tile_loadd(7, weight + kTile, 4 * kGroup);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * kGroup);
    _tile_stored(1, sums + kTile, 4 * kGroup);
    _tile_stored(2, sums + kTile * kGroup, 4 * kGroup);
    _tile_stored(3, sums + kTile * kGroup + kTile, 4 * kGroup);
    asm volatile("" ::: "memory");
  }

  __attribute__((target("avx512bf16"))) void write(int64_t x, int64_t channel, Element* out) const {
    const int64_t channels = call.out.channels - channel;
    const Float* const bias = reinterpret_cast<const Float*>(weights.bias + channel);
    for (int p = 0; p < kGroup && x + p < call.out.width; ++p, out += call.out.column_stride) {
      const Float* const sum = reinterpret_cast<const Float*>(sums + p * kGroup);
      const Float low = relu(sum[0] + bias[0]), high = relu(sum[1] + bias[1]);
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      if (channels >= kGroup)
        std::memcpy(out, &both, sizeof(both));
      else
        std::memcpy(out, &both, sizeof(Element) * channels);
    }
  }
};

#endif

// A task is a row of the result.
template <typename Products>
void write_rows(const StemConv& call, Parallel parallel) {
  Arena count{nullptr};
  Products(call, count);
  const int64_t height = call.out.height, work = call.out.width * call.out.channels;
  parallel_tasks(parallel, call.out.batch * height, work, count.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    Products products(call, arena);
    products.begin();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / height, y = task % height;
      auto* const out = static_cast<typename Products::Element*>(call.out.data) + offset_of(call.out, image, 0, y);
      products.write_row(image, y, out);
    }
    products.end();
  });
}

}  // namespace

void stem_conv_cpu(const StemConv& call, Parallel parallel) {
#if defined(BCM_AMX)
  if (call.out.dtype == DType::kBFloat16 && call.out.channels >= Tiles::kTile && has_amx())
    return write_rows<Tiles>(call, parallel);
#endif
  dispatch_float(call.out.dtype, [&](auto type) { write_rows<Vectors<decltype(type)>>(call, parallel); });
}

}  // namespace bcmfnet::BCM_ISA
