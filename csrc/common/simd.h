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

// Comparisons keep the first argument where the second is NaN.
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

// exp(x) of x <= 88, relative error 1e-7; 0 below -87; NaN stays.
static inline Float exp(Float x) {
  const Int underflow = x < -87.0f;
  x = underflow ? fill(-87.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Float n = (x * 1.44269504088896341f + magic) - magic;
  const Float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Float p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Int exponent = (__builtin_convertvector(n, Int) + 127) << 23;
  return underflow ? fill(0.0f) : p * float_of(exponent);
}

// Bits of the nearest float16 (ties to even) of 0 <= x < 65520, or of NaN.
static inline Int half_bits(Float x) {
  const Int bits = bits_of(x);
  const Int normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const Int subnormal = bits_of(x + 0.5f) - bits_of(fill(0.5f));
  const Int number = x < 6.103515625e-5f ? subnormal : normal;
  return x == x ? number : fill(int32_t{0x7e00});
}

// float32 of float16 and bfloat16 bits; one element, in a form that compilers turn into vectors.
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

}  // namespace bcmfnet::BCM_LEVEL
