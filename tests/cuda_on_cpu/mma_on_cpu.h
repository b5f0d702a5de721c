// What csrc/common/cuda/mma.h has. The product is exact, then rounded once; hardware rounds in an order of its own.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace cuda_on_cpu {

inline double widened(__half value) { return __half2float(value); }
inline double widened(__nv_bfloat16 value) { return __bfloat162float(value); }

// Of the 16 products of a row and a column, four from each of the four lanes that share them.
template <typename T>
double dot(const uint64_t* row, const uint64_t* column) {
  double sum = 0;
  for (int i = 0; i < 16; ++i) {
    const auto element = [i](const uint64_t* lanes) {
      return widened(T{static_cast<unsigned short>(lanes[i / 4] >> i % 4 * 16)});
    };
    sum += element(row) * element(column);
  }
  return sum;
}

}  // namespace cuda_on_cpu

namespace bcmfnet {

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], cuda_on_cpu::Here here = {}) {
  const auto meet = [here](uint32_t low, uint32_t high) {
    return cuda_on_cpu::meet("multiply_add", 0xffffffffu, low | uint64_t{high} << 32, here);
  };
  const unsigned row = cuda_on_cpu::lane / 4 * 4, column = cuda_on_cpu::lane % 4 * 8;  // their first lanes
  uint64_t rows[2][4];
  std::memcpy(rows[0], meet(a[0], a[2]) + row, sizeof(rows[0]));
  std::memcpy(rows[1], meet(a[1], a[3]) + row, sizeof(rows[1]));
  const uint64_t* columns = meet(b[0], b[1]) + column;
  for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(c[i] + cuda_on_cpu::dot<T>(rows[i / 2], columns + i % 2 * 4));
}

inline void load_operand(uint32_t (&a)[4], const void* from, cuda_on_cpu::Here here = {}) {
  const uint64_t* rows =
      cuda_on_cpu::meet("load_operand", 0xffffffffu, reinterpret_cast<uintptr_t>(from), here) + cuda_on_cpu::lane / 4;
  for (int i = 0; i < 4; ++i) a[i] = reinterpret_cast<const uint32_t*>(rows[8 * i])[cuda_on_cpu::lane % 4];
}

inline float relu(float value) { return value < 0 ? 0 : value; }

template <typename T>
uint32_t relu_pair(float low, float high);

template <>
inline uint32_t relu_pair<__half>(float low, float high) {
  return __half_as_ushort(__float2half_rn(relu(low))) | uint32_t{__half_as_ushort(__float2half_rn(relu(high)))} << 16;
}

template <>
inline uint32_t relu_pair<__nv_bfloat16>(float low, float high) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(relu(low))) |
         uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(relu(high)))} << 16;
}

}  // namespace bcmfnet
