// Vectors of the width that the file is compiled for. Every *_cpu.cpp is compiled once for each level of instruction
// sets (CMakeLists.txt), inside the namespace BCM_LEVEL. Whatever is shared with other files must be static: the linker
// would keep one copy of an inline function, and an old CPU could meet the one made of new instructions.
#pragma once

#include <cstdint>
#include <cstring>

namespace bcmfnet::BCM_LEVEL {

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

// The first argument where either is NaN.
static inline Float smaller(Float a, Float b) { return b < a ? b : a; }
static inline Float larger(Float a, Float b) { return b > a ? b : a; }

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

// exp(x) of x <= 88, relative error 1e-7; at least exp(-87), which is 1.6e-38; NaN stays.
static inline Float exp(Float x) {
  x = larger(x, fill(-87.0f));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const Float shifted = x * 1.44269504088896341f + magic;
  const Float n = shifted - magic;
  const Float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Float p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return float_of(bits_of(p) + (bits_of(shifted) << 23));  // times 2^n
}

// Bits of the nearest float16 (ties to even) of 0 <= x < 65520, or of NaN.
static inline Int half_bits(Float x) {
  const Int bits = bits_of(x);
  const Int normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const Int subnormal = bits_of(x + 0.5f) - bits_of(fill(0.5f));
  const Int number = x < 6.103515625e-5f ? subnormal : normal;
  return x == x ? number : fill(int32_t{0x7e00});
}

}  // namespace bcmfnet::BCM_LEVEL
