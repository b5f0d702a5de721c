// Rows of elements of any floating-point type and strides, from and to floats.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/integers.h"
#include "common/simd.h"
#include "common/view.h"

namespace bcmfnet::BCM_ISA {

constexpr int kChannels = 32;  // the channels of a pixel are padded with zeros to blocks of so many floats

// Element types: how a vector of one becomes floats, and how floats are rounded to the nearest elements.
struct Float32 {
  using Element = float;
  typedef Float Vector;
  static Float widen(Float value) { return value; }
  static Float narrow(Float value) { return value; }
};

struct BFloat16 {
  using Element = uint16_t;
  typedef Short Vector;
  static Float widen(Short bits) { return float_of(__builtin_convertvector(bits, Int) << 16); }
  static Short narrow(Float value) { return __builtin_convertvector(bfloat16_bits(value), Short); }
};

struct Float16 {
  using Element = uint16_t;
  typedef Short Vector;
#if defined(__AVX512F__)
  static Float widen(Short bits) { return (Float)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
  static Short narrow(Float value) {
    return (Short)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif defined(__F16C__)
  static Float widen(Short bits) { return (Float)_mm256_cvtph_ps((__m128i)bits); }
  static Short narrow(Float value) { return (Short)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
#else
  static Float widen(Short bits) {
    const Int half = __builtin_convertvector(bits, Int);
    // 2^112 is the difference of the exponents' biases; subnormals come out right too.
    const Float scaled = float_of((half & 0x7fff) << 13) * 5.192296858534828e33f;
    const Int special = (half & 0x7c00) == 0x7c00;
    return float_of(bits_of(scaled) | (special & 0x7f800000) | (half & 0x8000) << 16);
  }
  static Short narrow(Float value) { return __builtin_convertvector(signed_half_bits(value), Short); }
#endif
};

template <typename Call>
__attribute__((always_inline)) static inline auto dispatch_float(DType type, Call call) {
  return bcmfnet::dispatch_float<Float32, Float16, BFloat16>(type, call);
}

// `lanes` elements that are `stride` apart, then zeros.
template <typename Type>
static inline Float read_some(const typename Type::Element* from, int64_t stride, int64_t lanes) {
  if (stride == 1 && lanes >= kLanes) return Type::widen(load<typename Type::Vector>(from));
  typename Type::Element some[kLanes] = {};
  for (int64_t i = 0; i < kLanes && i < lanes; ++i) some[i] = from[i * stride];
  return Type::widen(load<typename Type::Vector>(some));
}

template <typename Type>
static inline void write_some(typename Type::Element* to, int64_t stride, Float value, int64_t lanes) {
  const typename Type::Vector elements = Type::narrow(value);
  if (stride == 1 && lanes >= kLanes) {
    store(to, elements, kLanes);
  } else {
    for (int64_t i = 0; i < kLanes && i < lanes; ++i) to[i * stride] = elements[i];
  }
}

// `count` elements of one channel, `stride` apart. Whole vectors are written to `to`.
template <typename Type>
static void read_plane(const typename Type::Element* from, int64_t stride, int64_t count, float* to) {
  constexpr int64_t kBlock = 64;  // A vector cannot be loaded right after its elements have been stored one by one.
  for (int64_t x = 0; x < count && stride != 1; x += kBlock) {
    typename Type::Element elements[kBlock];
    const int64_t some = smaller_of(count - x, kBlock);
    for (int64_t i = 0; i < some; ++i) elements[i] = from[(x + i) * stride];
    read_plane<Type>(elements, 1, some, to + x);
  }
  if (stride != 1) return;
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t x = 0; x < whole; x += kLanes) store(to + x, Type::widen(load<typename Type::Vector>(from + x)), kLanes);
  if (whole == count) return;
  if (whole == 0) return store(to, read_some<Type>(from, 1, count), kLanes);
  store(to + whole, fill(0.0f), kLanes);  // and over it the last vector that is full, for the same reason
  store(to + count - kLanes, Type::widen(load<typename Type::Vector>(from + count - kLanes)), kLanes);
}

static inline void read_plane(DType type, const void* data, int64_t at, int64_t stride, int64_t count, float* to) {
  dispatch_float(type, [=](auto tag) {
    using Type = decltype(tag);
    read_plane<Type>(static_cast<const typename Type::Element*>(data) + at, stride, count, to);
  });
}

// Writes factor * from to `count` elements of one channel; `from` has whole vectors.
static inline void write_plane(
    DType type, void* data, int64_t at, int64_t stride, int64_t count, float factor, const float* from) {
  dispatch_float(type, [=](auto tag) {
    using Type = decltype(tag);
    auto* to = static_cast<typename Type::Element*>(data) + at;
    for (int64_t x = 0; x < count; x += kLanes)
      write_some<Type>(to + x * stride, stride, factor * load<Float>(from + x), count - x);
  });
}

// `columns` pixels of `channels` elements, from the offset `at` on.
struct Row {
  int64_t at, channel_stride, column_stride, columns, channels;
};

// `channels` channels, from `channel` on, of a row of a map.
static inline Row row_of(const View& view, int64_t image, int64_t channel, int64_t row, int64_t channels) {
  return {offset_of(view, image, channel, row), view.channel_stride, view.column_stride, view.width, channels};
}

// Reads a row to floats with the channels innermost, `pitch` apart from pixel to pixel. Channels beyond the last one
// are zeros up to a multiple of kLanes.
template <typename Type>
static void read_row(const void* data, const Row& row, float* to, int64_t pitch) {
  const typename Type::Element* first = static_cast<const typename Type::Element*>(data) + row.at;
  if (row.channel_stride == 1) {
    for (int64_t x = 0; x < row.columns; ++x)
      for (int64_t c = 0; c < row.channels; c += kLanes)
        store(to + x * pitch + c, read_some<Type>(first + x * row.column_stride + c, 1, row.channels - c), kLanes);
    return;
  }
  for (int64_t c = 0; c < round_up(row.channels, kLanes); ++c) {
    const int64_t there = c < row.channels ? row.columns : 0;
    for (int64_t x = 0; x < row.columns; x += kLanes) {
      alignas(64) float pixels[kLanes];
      const auto* plane = first + (there ? c * row.channel_stride + x * row.column_stride : 0);
      store(pixels, read_some<Type>(plane, row.column_stride, there - x), kLanes);
      for (int64_t i = 0; i < kLanes && x + i < row.columns; ++i) to[(x + i) * pitch + c] = pixels[i];
    }
  }
}

template <typename Type>
static void write_row(void* data, const Row& row, const float* from, int64_t pitch) {
  typename Type::Element* first = static_cast<typename Type::Element*>(data) + row.at;
  if (row.channel_stride == 1) {
    for (int64_t x = 0; x < row.columns; ++x)
      for (int64_t c = 0; c < row.channels; c += kLanes)
        write_some<Type>(first + x * row.column_stride + c, 1, load<Float>(from + x * pitch + c), row.channels - c);
    return;
  }
  for (int64_t c = 0; c < row.channels; ++c)
    for (int64_t x = 0; x < row.columns; x += kLanes) {
      alignas(64) float pixels[kLanes] = {};
      for (int64_t i = 0; i < kLanes && x + i < row.columns; ++i) pixels[i] = from[(x + i) * pitch + c];
      typename Type::Element* plane = first + c * row.channel_stride + x * row.column_stride;
      write_some<Type>(plane, row.column_stride, load<Float>(pixels), row.columns - x);
    }
}

// By a plain switch: GCC makes copies for a constant pitch, 15 % faster, of what is called without a lambda between.
static inline void read_row(DType type, const void* data, const Row& row, float* to, int64_t pitch) {
  switch (type) {
    case DType::kFloat16: return read_row<Float16>(data, row, to, pitch);
    case DType::kBFloat16: return read_row<BFloat16>(data, row, to, pitch);
    default: return read_row<Float32>(data, row, to, pitch);
  }
}

static inline void write_row(DType type, void* data, const Row& row, const float* from, int64_t pitch) {
  switch (type) {
    case DType::kFloat16: return write_row<Float16>(data, row, from, pitch);
    case DType::kBFloat16: return write_row<BFloat16>(data, row, from, pitch);
    default: return write_row<Float32>(data, row, from, pitch);
  }
}

}  // namespace bcmfnet::BCM_ISA
