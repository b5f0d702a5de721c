// Rows of pixels of any element type and strides, from and to aligned floats with the channels innermost.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/planes.h"
#include "common/simd.h"

namespace bcmfnet::BCM_LEVEL {

constexpr int kChannels = 32;  // floats of a pixel are padded to whole blocks of so many, with zeros

static inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Element types: how a vector of one becomes floats, and the other way round.
struct Single {
  using Element = float;
  typedef Float Vector;
  static Float widen(Float value) { return value; }
  static Float narrow(Float value) { return value; }
};

struct Brain {
  using Element = uint16_t;
  typedef Short Vector;
  static Float widen(Short bits) { return float_of(__builtin_convertvector(bits, Int) << 16); }
  static Short narrow(Float value) { return __builtin_convertvector(bfloat16_bits(value), Short); }
};

struct Half {
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
    const Float scaled = float_of((half & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112, see from_half
    const Int special = (half & 0x7c00) == 0x7c00;
    return float_of(bits_of(scaled) | (special & 0x7f800000) | (half & 0x8000) << 16);
  }
  static Short narrow(Float value) { return __builtin_convertvector(signed_half_bits(value), Short); }
#endif
};

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

// `columns` pixels of `channels` elements, counted from `at`.
struct Row {
  int64_t at, channel_stride, column_stride, columns, channels;
};

// To floats `pitch` apart from pixel to pixel; up to a multiple of kLanes, the channels that are not there are zeros.
template <typename Type>
static void read_row(const void* from, const Row& row, float* to, int64_t pitch) {
  const typename Type::Element* first = static_cast<const typename Type::Element*>(from) + row.at;
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

static inline void read_row(DType type, const void* from, const Row& row, float* to, int64_t pitch) {
  switch (type) {
    case DType::kFloat16: return read_row<Half>(from, row, to, pitch);
    case DType::kBFloat16: return read_row<Brain>(from, row, to, pitch);
    default: return read_row<Single>(from, row, to, pitch);
  }
}

template <typename Type>
static void write_row(void* to, const Row& row, const float* from, int64_t pitch) {
  typename Type::Element* first = static_cast<typename Type::Element*>(to) + row.at;
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

static inline void write_row(DType type, void* to, const Row& row, const float* from, int64_t pitch) {
  switch (type) {
    case DType::kFloat16: return write_row<Half>(to, row, from, pitch);
    case DType::kBFloat16: return write_row<Brain>(to, row, from, pitch);
    default: return write_row<Single>(to, row, from, pitch);
  }
}

}  // namespace bcmfnet::BCM_LEVEL
