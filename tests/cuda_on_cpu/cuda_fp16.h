// float16 of tests/cuda_on_cpu: storage and conversions; arithmetic is the caller's, in float.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const float scaled = __uint_as_float((value.bits & 0x7fffu) << 13) * 0x1p112f;  // the exponents' biases differ by 112
  const unsigned special = (value.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return __uint_as_float(__float_as_uint(scaled) | special | (value.bits & 0x8000u) << 16);
}

inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  unsigned number = 0x7c00u;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude < 0x38800000u) {  // subnormal: the last bit of a number about 0.5 counts 2^-24
    number = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  } else if (magnitude < 0x477ff000u) {  // 65520 and above round to infinity
    number = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<unsigned short>(sign | number)};
}

inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
inline float __low2float(__half2 value) { return __half2float(value.x); }
inline float __high2float(__half2 value) { return __half2float(value.y); }
inline float2 __half22float2(__half2 value) { return {__low2float(value), __high2float(value)}; }
