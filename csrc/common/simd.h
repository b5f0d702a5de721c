// Vectors of the width that the file is compiled for. Every *_cpu.cpp is compiled once for each instruction set
// (CMakeLists.txt), inside the namespace BCM_ISA. Whatever is shared with other files must be static: the linker would
// keep one copy of an inline function, and an old CPU could meet the one made of new instructions.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common/isa.h"

namespace bcmfnet::BCM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Float __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Short __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Byte __attribute__((vector_size(kLanes)));

template <typename Vector>
static inline Vector load(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// The first `count` elements of a vector; all of them is one plain store.
template <typename Vector>
static inline void store(void* to, Vector value, int count) {
  if (count == kLanes) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    std::memcpy(to, &value, sizeof(value) / kLanes * count);
  }
}

static inline Float fill(float value) { return Float{} + value; }
static inline Int fill(int32_t value) { return Int{} + value; }

static inline Int lane_numbers() {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// The first argument where either is NaN. (The compiler makes a comparison and a selection of `b > a ? b : a`.)
static inline Float smaller(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_maskz_min_ps(0xffff, (__m512)b, (__m512)a);
#elif defined(__AVX2__)
  return (Float)_mm256_min_ps((__m256)b, (__m256)a);
#else
  return b < a ? b : a;
#endif
}

static inline Float larger(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)a);
#elif defined(__AVX2__)
  return (Float)_mm256_max_ps((__m256)b, (__m256)a);
#else
  return b > a ? b : a;
#endif
}

static inline bool any(Int mask) {
  typedef int64_t Long __attribute__((vector_size(4 * kLanes)));
  Long wide;
  std::memcpy(&wide, &mask, sizeof(wide));
  int64_t bits = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) bits |= wide[lane];
  return bits != 0;
}

static inline Float permute(Float value, Int index) {
#if defined(__clang__)
  Float result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = value[index[lane]];
  return result;
#else
  return __builtin_shuffle(value, index);
#endif
}

static inline Int bits_of(Float value) {
  Int bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline Float float_of(Int bits) {
  Float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// exp(x) of x <= 88, relative error 2e-7; at least exp(-87), which is 1.6e-38; NaN stays.
static inline Float exp(Float x) {
  x = larger(x, fill(-87.0f));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const Float shifted = x * 1.44269504088896341f + magic;
  const Float n = shifted - magic;
  const Float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Float p = fill(8.3125031e-3f);
  p = p * r + 4.1890328e-2f;
  p = p * r + 1.6667115e-1f;
  p = p * r + 4.9999230e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (Float)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  return float_of(bits_of(p) + (bits_of(shifted) << 23));  // times 2^n
#endif
}

// log(x) of x >= 1, relative error 1e-7; NaN stays.
static inline Float log(Float x) {
  const Int bits = bits_of(x);
  Float exponent = __builtin_convertvector((bits >> 23) - 127, Float);
  Float m = float_of((bits & 0x7fffff) | 0x3f800000);  // in [1, 2)
  const Int high = m > 1.41421356f;
  m = high ? m * 0.5f : m;
  exponent = high ? exponent + 1.0f : exponent;
  const Float r = m - 1.0f, square = r * r;
  Float p = fill(7.0376836292e-2f);
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const Float tail = p * r * square + exponent * -2.12194440e-4f - 0.5f * square;
  const Float result = r + tail + exponent * 0.693359375f;
  return x < float_of(fill(int32_t{0x7f800000})) ? result : x;  // infinity and NaN stay
}

// log(1 + x) of 0 <= x <= 1, relative error 2e-7; NaN stays. It is 2 artanh(x / (2 + x)).
static inline Float log1p(Float x) {
  const Float s = x / (x + 2.0f), square = s * s, fourth = square * square;
  Float p = (square * (1.0f / 11) + 1.0f / 9) + fourth * (1.0f / 13);  // in pairs, which do not wait for each other
  p = (square * (1.0f / 7) + 1.0f / 5) + fourth * p;
  return 2.0f * s * ((square * (1.0f / 3) + 1.0f) + fourth * p);
}

// base[index] in each lane.
static inline Float gather(const float* base, Int index) {
#if defined(__AVX512F__)
  return (Float)_mm512_mask_i32gather_ps((__m512)fill(0.0f), 0xffff, (__m512i)index, base, 4);  // the plain one warns
#elif defined(__AVX2__)
  return (Float)_mm256_i32gather_ps(base, (__m256i)index, 4);
#else
  Float result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = base[index[lane]];
  return result;
#endif
}

static inline Int gather(const int32_t* base, Int index) {
  return bits_of(gather(reinterpret_cast<const float*>(base), index));
}

// Bits of the nearest float16 (ties to even) of 0 <= x < 65520, or of NaN.
static inline Int half_bits(Float x) {
  const Int bits = bits_of(x);
  const Int normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const Int subnormal = bits_of(x + 0.5f) - bits_of(fill(0.5f));
  const Int number = x < 6.103515625e-5f ? subnormal : normal;
  return x == x ? number : fill(int32_t{0x7e00});
}

// Bits of the nearest float16 of any x; magnitudes from 65520 on are infinite.
static inline Int signed_half_bits(Float x) {
  const Int bits = bits_of(x), sign = bits & static_cast<int32_t>(0x80000000u);
  const Float magnitude = float_of(bits ^ sign);
  const Int number = magnitude >= 65520.0f ? fill(int32_t{0x7c00}) : half_bits(magnitude);
  return number | ((sign >> 16) & 0x8000);
}

// Bits of the nearest bfloat16.
static inline Int bfloat16_bits(Float x) {
  const Int bits = bits_of(x);
  const Int nearest = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  return x == x ? nearest : fill(int32_t{0x7fc0});
}

}  // namespace bcmfnet::BCM_ISA
