// The tensor core's product of 16-bit matrices with float32 sums, and what brings its operands into their places.
//
// multiply_add<T>(c, a, b) is c += a @ b, made by a whole warp: a [16, 16], b [16, 8], c [16, 8]. With g = lane / 4 and
// t = lane % 4, a lane holds of a, in pairs of columns, the low half first:
//   a[0] = (g, 2t)   a[1] = (g + 8, 2t)   a[2] = (g, 2t + 8)   a[3] = (g + 8, 2t + 8)
// of b, in pairs of rows:
//   b[0] = (2t, g)   b[1] = (2t + 8, g)
// and of c:
//   c[0] = (g, 2t)   c[1] = (g, 2t + 1)   c[2] = (g + 8, 2t)   c[3] = (g + 8, 2t + 1)
//
// load_operand(a, from) is a [16, 16] from shared memory: lane l gives the address of row l % 16 at column l / 16 * 8,
// 16 bytes that are aligned.
//
// relu_pair<T>(low, high) are two numbers of type T, the low half first, that are not negative; NaN stays.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef BCM_CUDA_ON_CPU
#include "mma_on_cpu.h"  // of tests/cuda_on_cpu
#else

namespace bcmfnet {

template <typename T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define BCM_MULTIPLY_ADD(T, name)                                                                        \
  template <>                                                                                            \
  __device__ inline void multiply_add<T>(float(&c)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                  \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                    \
  }
BCM_MULTIPLY_ADD(__half, "f16")
BCM_MULTIPLY_ADD(__nv_bfloat16, "bf16")

#undef BCM_MULTIPLY_ADD

__device__ inline void load_operand(uint32_t (&a)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
}

template <typename T>
__device__ uint32_t relu_pair(float low, float high);

#define BCM_RELU_PAIR(T, name)                                                                     \
  template <>                                                                                      \
  __device__ inline uint32_t relu_pair<T>(float low, float high) {                                 \
    uint32_t pair;                                                                                 \
    asm("cvt.rn.relu." name "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));              \
    return pair;                                                                                   \
  }
BCM_RELU_PAIR(__half, "f16")
BCM_RELU_PAIR(__nv_bfloat16, "bf16")

#undef BCM_RELU_PAIR

}  // namespace bcmfnet

#endif
