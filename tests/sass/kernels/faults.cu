// Kernels that are wrong where `fault` is set, and right where it is not; and one whose instructions are counted.
#include "common/launch.h"

namespace {

constexpr int kThreads = 64;

__global__ void shifted(const float* in, float* out, int shift) {
  out[threadIdx.x] = in[static_cast<int>(threadIdx.x) + shift];
}

__global__ void by_pairs(const float* in, float* out, int shift) {
  const float2 pair = *reinterpret_cast<const float2*>(in + 2 * threadIdx.x + shift);
  out[threadIdx.x] = pair.x + pair.y;
}

// The last warp's numbers are used without having been written.
__global__ void unwritten(const float* in, float* out, int fault) {
  __shared__ float held[kThreads];
  if (fault == 0 || threadIdx.x < 32) held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x ^ 32];
}

// They are read and not used.
__global__ void unwritten_unused(const float* in, float* out, int fault) {
  __shared__ float held[kThreads];
  if (fault == 0 || threadIdx.x < 32) held[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float other = held[threadIdx.x ^ 32];
  out[threadIdx.x] = threadIdx.x < 32 ? 1.0f : 2 * other;
}

template <bool kFault>
__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float held[kThreads];
  held[threadIdx.x] = in[threadIdx.x];
  if (!kFault) __syncthreads();
  out[threadIdx.x] = held[threadIdx.x ^ 32];
}

// A loop writes what another warp has not yet read.
template <bool kFault>
__global__ void missing_barrier_in_loop(const float* in, float* out) {
  __shared__ float held[kThreads];
  float sum = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    held[threadIdx.x] = in[threadIdx.x] + pass;
    __syncthreads();
    sum += held[threadIdx.x ^ 32];
    if (!kFault) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// The first warp reads what the second writes next.
template <bool kFault>
__global__ void missing_barrier_before_write(const float* in, float* out) {
  __shared__ float held[kThreads];
  if (threadIdx.x < 32) held[threadIdx.x] = in[threadIdx.x + 32], held[threadIdx.x + 32] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 32) out[threadIdx.x] = held[threadIdx.x], out[threadIdx.x + 32] = held[threadIdx.x + 32];
  if (!kFault) __syncthreads();
  if (threadIdx.x >= 32) held[threadIdx.x] = 0;
  __syncthreads();
  if (held[threadIdx.x] < 0) out[threadIdx.x] = 0;
}

__global__ void divergent_barrier(const float* in, float* out, int fault) {
  if (fault && threadIdx.x < 40) {
    out[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
  } else {
    out[threadIdx.x] = in[threadIdx.x] + 1;
    __syncthreads();
  }
}

__global__ void absent_lane(const float* in, float* out, int fault) {
  if (fault && threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

__global__ void dynamic_shared(const float* in, float* out, int shift) {
  BCM_DYNAMIC_SHARED(float, held);
  held[threadIdx.x + shift] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x + shift];
}

// Of its two warps the first works, and adds up numbers that lie 64 bytes apart.
__global__ void counted(const float* in, float* out, int rows) {
  __shared__ float held[32];
  float sum = 0;
  if (threadIdx.x < 32) {
#pragma unroll 1
    for (int row = 0; row < rows; ++row) sum += exp2f(in[16 * (32 * row + threadIdx.x)]);
    held[threadIdx.x] = sum;
  }
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = held[threadIdx.x % 32];
}

}  // namespace

extern "C" int run_shifted(const float* in, float* out, int fault) {
  BCM_LAUNCH(shifted, 1, kThreads, 0, nullptr, in, out, fault);
  return cudaGetLastError();
}
extern "C" int run_by_pairs(const float* in, float* out, int fault) {
  BCM_LAUNCH(by_pairs, 1, kThreads, 0, nullptr, in, out, fault);
  return cudaGetLastError();
}
extern "C" int run_unwritten(const float* in, float* out, int fault) {
  BCM_LAUNCH(unwritten, 1, kThreads, 0, nullptr, in, out, fault);
  return cudaGetLastError();
}
extern "C" int run_unwritten_unused(const float* in, float* out, int fault) {
  BCM_LAUNCH(unwritten_unused, 1, kThreads, 0, nullptr, in, out, fault);
  return cudaGetLastError();
}
extern "C" int run_missing_barrier(const float* in, float* out, int fault) {
  BCM_LAUNCH((fault ? missing_barrier<true> : missing_barrier<false>), 1, kThreads, 0, nullptr, in, out);
  return cudaGetLastError();
}
extern "C" int run_missing_barrier_in_loop(const float* in, float* out, int fault) {
  const auto kernel = fault ? missing_barrier_in_loop<true> : missing_barrier_in_loop<false>;
  BCM_LAUNCH(kernel, 1, kThreads, 0, nullptr, in, out);
  return cudaGetLastError();
}
extern "C" int run_missing_barrier_before_write(const float* in, float* out, int fault) {
  const auto kernel = fault ? missing_barrier_before_write<true> : missing_barrier_before_write<false>;
  BCM_LAUNCH(kernel, 1, kThreads, 0, nullptr, in, out);
  return cudaGetLastError();
}
extern "C" int run_divergent_barrier(const float* in, float* out, int fault) {
  BCM_LAUNCH(divergent_barrier, 1, kThreads, 0, nullptr, in, out, fault);
  return cudaGetLastError();
}
extern "C" int run_absent_lane(const float* in, float* out, int fault) {
  BCM_LAUNCH(absent_lane, 1, kThreads, 0, nullptr, in, out, fault);
  return cudaGetLastError();
}
extern "C" int run_dynamic_shared(const float* in, float* out, int fault) {
  BCM_LAUNCH(dynamic_shared, 1, kThreads, kThreads * sizeof(float), nullptr, in, out, fault);
  return cudaGetLastError();
}
extern "C" int run_counted(const float* in, float* out, int rows) {
  BCM_LAUNCH(counted, 3, kThreads, 0, nullptr, in, out, rows);
  return cudaGetLastError();
}
extern "C" int run_clear(float* out, int bytes) {
  BCM_TRY(cudaMemsetAsync(out, 0, bytes, nullptr));
  return cudaGetLastError();
}
