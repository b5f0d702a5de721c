// Rows of logits of any type and stride as planes of floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/simd.h"

namespace bcmfnet::BCM_LEVEL {

// float32 of one element, in a form that compilers turn into vectors.
static inline float from_float(float value) { return value; }

static inline float from_half(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  const uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  float scaled;
  std::memcpy(&scaled, &magnitude, 4);
  scaled *= 5.192296858534828e33f;  // 2^112: the difference of the exponents' biases, subnormals included
  uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  bits |= special | static_cast<uint32_t>(half & 0x8000) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float from_bfloat16(uint16_t brain) {
  const uint32_t bits = static_cast<uint32_t>(brain) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename T, float (*convert)(T)>
static void read_plane(const void* logits, int64_t at, int64_t stride, int64_t count, float* to) {
  const T* from = static_cast<const T*>(logits) + at;
  if (stride == 1) {
    for (int64_t x = 0; x < count; ++x) to[x] = convert(from[x]);
  } else {
    for (int64_t x = 0; x < count; ++x) to[x] = convert(from[x * stride]);
  }
}

// `count` elements from the offset `at` on, `stride` elements apart.
static inline void read_plane(DType type, const void* logits, int64_t at, int64_t stride, int64_t count, float* to) {
  switch (type) {
    case DType::kFloat16: return read_plane<uint16_t, from_half>(logits, at, stride, count, to);
    case DType::kBFloat16: return read_plane<uint16_t, from_bfloat16>(logits, at, stride, count, to);
    default: return read_plane<float, from_float>(logits, at, stride, count, to);
  }
}

// Nearest values of an element's type, as bits.
static inline float to_float(Float value, int lane) { return value[lane]; }
static inline uint16_t to_half(Float value, int lane) { return static_cast<uint16_t>(signed_half_bits(value)[lane]); }
static inline uint16_t to_bfloat16(Float value, int lane) { return static_cast<uint16_t>(bfloat16_bits(value)[lane]); }

template <typename T, T (*convert)(Float, int)>
static void write_plane(void* plane, int64_t at, int64_t stride, int64_t count, float factor, const float* from) {
  T* to = static_cast<T*>(plane) + at;
  for (int64_t x = 0; x < count; x += kLanes) {
    const Float value = factor * load<Float>(from + x);
    for (int64_t i = 0; i < kLanes && x + i < count; ++i) to[(x + i) * stride] = convert(value, static_cast<int>(i));
  }
}

// Write factor * from to `count` elements from the offset `at` on, `stride` elements apart; `from` has whole vectors.
static inline void write_plane(
    DType type, void* plane, int64_t at, int64_t stride, int64_t count, float factor, const float* from) {
  switch (type) {
    case DType::kFloat16: return write_plane<uint16_t, to_half>(plane, at, stride, count, factor, from);
    case DType::kBFloat16: return write_plane<uint16_t, to_bfloat16>(plane, at, stride, count, factor, from);
    default: return write_plane<float, to_float>(plane, at, stride, count, factor, from);
  }
}

}  // namespace bcmfnet::BCM_LEVEL
