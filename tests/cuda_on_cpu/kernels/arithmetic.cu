// What one thread computes: conversions, bits, vectors, and the functions that only device code has.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.h"

namespace {

__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void narrow(float value, __half* to) { *to = __float2half_rn(value); }
__device__ void narrow(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }

template <typename T>
__global__ void widen_all(const T* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = widen(in[i]);
}

template <typename T>
__global__ void narrow_all(const float* in, T* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) narrow(in[i], out + i);
}

// Through pairs, there and back; the two of a pair change places.
__global__ void pairs(const float2* in, float2* half_pairs, float2* brain_pairs) {
  const float2 value = make_float2(in[threadIdx.x].y, in[threadIdx.x].x);
  half_pairs[threadIdx.x] = __half22float2(__floats2half2_rn(value.x, value.y));
  brain_pairs[threadIdx.x] = __bfloat1622float2(__floats2bfloat162_rn(value.x, value.y));
}

__global__ void bits(const int* in, int* out) {
  const int x = in[threadIdx.x];
  const unsigned u = static_cast<unsigned>(x);
  const long long wide = (static_cast<long long>(x) << 20) ^ x;
  int* mine = out + 8 * threadIdx.x;
  mine[0] = __popc(u);
  mine[1] = __clz(x);
  mine[2] = __ffs(x);
  mine[3] = static_cast<int>(__brev(u));
  mine[4] = __popcll(wide);
  mine[5] = __clzll(wide);
  mine[6] = __ffsll(wide);
  mine[7] = __float_as_int(__uint_as_float(__float_as_uint(__int_as_float(x & 0x3fffffff))));
}

__global__ void functions(const float* a, const float* b, float* out) {
  const int i = threadIdx.x;
  const float x = a[i], y = b[i];
  float* mine = out + 12 * i;
  mine[0] = fmaf(x, y, -1.0f);
  mine[1] = __fadd_rn(__fmul_rn(x, y), -1.0f);  // two roundings, where the line before has one
  mine[2] = __fsub_rn(x, y);
  mine[3] = __expf(x);
  mine[4] = __logf(y);
  mine[5] = exp2f(x);
  mine[6] = rsqrtf(y);
  mine[7] = min(x, y);
  mine[8] = fmaxf(max(x, nanf("")), -100.0f);
  mine[9] = __fdividef(x, y);
  mine[10] = __saturatef(x);
  mine[11] = static_cast<float>(max(7u, i) + min(3, i));
}

__global__ void vectors(const float4* in, float4* out, const ushort4* small, int4* sums) {
  const float4 value = in[threadIdx.x];
  out[threadIdx.x] = make_float4(value.w, value.z, value.y, value.x);
  const ushort4 s = small[threadIdx.x];
  const int2 ends = make_int2(s.x, s.w);
  sums[threadIdx.x] = make_int4(ends.x + ends.y, s.y, s.z, static_cast<int>(sizeof(uint2)));
}

constexpr int kThreads = 256;

template <typename T>
int widen_launch(const void* in, float* out, int n) {
  BCM_LAUNCH(widen_all<T>, (n + kThreads - 1) / kThreads, kThreads, 0, nullptr, static_cast<const T*>(in), out, n);
  return cudaGetLastError();
}

template <typename T>
int narrow_launch(const float* in, void* out, int n) {
  BCM_LAUNCH(narrow_all<T>, (n + kThreads - 1) / kThreads, kThreads, 0, nullptr, in, static_cast<T*>(out), n);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

int widen_float16(const void* in, float* out, int n) { return widen_launch<__half>(in, out, n); }
int widen_bfloat16(const void* in, float* out, int n) { return widen_launch<__nv_bfloat16>(in, out, n); }
int narrow_float16(const float* in, void* out, int n) { return narrow_launch<__half>(in, out, n); }
int narrow_bfloat16(const float* in, void* out, int n) { return narrow_launch<__nv_bfloat16>(in, out, n); }

int swap_pairs(const void* in, void* half_pairs, void* brain_pairs, int n) {
  BCM_LAUNCH(pairs, 1, n, 0, nullptr, static_cast<const float2*>(in), static_cast<float2*>(half_pairs),
             static_cast<float2*>(brain_pairs));
  return cudaGetLastError();
}

int bits_of(const int* in, int* out, int n) {
  BCM_LAUNCH(bits, 1, n, 0, nullptr, in, out);
  return cudaGetLastError();
}

int functions_of(const float* a, const float* b, float* out, int n) {
  BCM_LAUNCH(functions, 1, n, 0, nullptr, a, b, out);
  return cudaGetLastError();
}

int vectors_of(const void* in, void* out, const void* small, void* sums, int n) {
  BCM_LAUNCH(vectors, 1, n, 0, nullptr, static_cast<const float4*>(in), static_cast<float4*>(out),
             static_cast<const ushort4*>(small), static_cast<int4*>(sums));
  return cudaGetLastError();
}

}
