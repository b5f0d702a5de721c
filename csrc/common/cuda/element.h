// Elements of every type as float, and back to the nearest.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace bcmfnet {

__device__ inline float as_float(uint8_t value) { return value; }
__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(__half value) { return __half2float(value); }
__device__ inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

template <typename Call>
auto dispatch_float(DType type, Call call) {
  return dispatch_float<float, __half, __nv_bfloat16>(type, call);
}

}  // namespace bcmfnet
