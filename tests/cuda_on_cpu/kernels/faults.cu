// Kernels that are wrong where `kFault` is set, and right where it is not.
#include "common/launch.h"

namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

template <bool kFault>
__global__ void missing_barrier(const float* in, float* out) {
  __shared__ float part[kThreads];
  part[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (!kFault) __syncthreads();
  for (unsigned width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) part[threadIdx.x] += part[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

// The first warp writes, all read: only a block whose last warp goes first shows that the barrier is missing.
template <bool kFault>
__global__ void missing_barrier_after_first_warp(const float* in, float* out) {
  __shared__ float first;
  if (threadIdx.x == 0) first = in[blockIdx.x * kThreads];
  if (!kFault) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = first;
}

// A loop writes a tile that others have not yet read.
template <bool kFault>
__global__ void missing_barrier_in_loop(const float* in, float* out) {
  __shared__ float tile[kThreads];
  float sum = 0;
  for (int pass = 0; pass < 4; ++pass) {
    tile[threadIdx.x] = in[threadIdx.x] + pass;
    __syncthreads();
    sum += tile[(threadIdx.x + 64) % kThreads];
    if (!kFault) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool kFault>
__global__ void divergent_barrier(float* out) {
  if (kFault && threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

// One lane of a warp waits for the block, the others for that lane.
template <bool kFault>
__global__ void barrier_and_shuffle(float* out) {
  float value = 1;
  if (kFault && threadIdx.x % 32 == 5) {
    __syncthreads();
  } else {
    value = __shfl_xor_sync(kAll, value, 1);
    __syncthreads();
  }
  out[threadIdx.x] = value;
}

template <bool kFault>
__global__ void exited_lane(float* out) {
  if (kFault && threadIdx.x == 77) return;
  out[threadIdx.x] = __shfl_down_sync(kAll, 1.0f, 1);
}

template <bool kFault>
__global__ void mask_without_caller(float* out) {
  const unsigned mask = kFault && threadIdx.x == 2 ? 0 : kFault ? kAll - 4 : kAll;
  out[threadIdx.x] = static_cast<float>(__ballot_sync(mask, 1) == mask);
}

// The first half of a warp waits for all; the second is content with itself.
template <bool kFault>
__global__ void masks_differ(float* out) {
  out[threadIdx.x] = static_cast<float>(__all_sync(kFault && threadIdx.x % 32 >= 16 ? 0xffff0000u : kAll, 1));
}

template <bool kFault>
__global__ void calls_differ(float* out) {
  out[threadIdx.x] = static_cast<float>(kFault && threadIdx.x % 2 ? __any_sync(kAll, 1) : __all_sync(kAll, 1));
}

__global__ void read_global(const float* in, float* out, int shift) {
  out[threadIdx.x] = in[threadIdx.x + shift];  // LINE global
}

__global__ void read_static(const float* in, float* out, int shift) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float* from = tile + threadIdx.x;
  if (shift > 1) from += shift;
  out[threadIdx.x] = from[0] + tile[threadIdx.x + (shift == 1)];  // LINE static
}

__global__ void read_dynamic(const float* in, float* out, int shift) {
  BCM_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + shift];  // LINE dynamic
}

__global__ void read_misaligned(const float* in, float* out, int shift) {
  const float4 four = *reinterpret_cast<const float4*>(in + shift);  // LINE misaligned
  out[threadIdx.x] = four.x;
}

}  // namespace

#define LAUNCH_EITHER(kernel, grid, ...)                                \
  if (fault) {                                                          \
    BCM_LAUNCH(kernel<true>, grid, kThreads, 0, nullptr, __VA_ARGS__);  \
  } else {                                                              \
    BCM_LAUNCH(kernel<false>, grid, kThreads, 0, nullptr, __VA_ARGS__); \
  }                                                                     \
  return cudaGetLastError()

extern "C" {

int run_missing_barrier(const float* in, float* out, int blocks, int fault) {
  LAUNCH_EITHER(missing_barrier, blocks, in, out);
}
int run_missing_barrier_after_first_warp(const float* in, float* out, int blocks, int fault) {
  LAUNCH_EITHER(missing_barrier_after_first_warp, blocks, in, out);
}
int run_missing_barrier_in_loop(const float* in, float* out, int blocks, int fault) {
  LAUNCH_EITHER(missing_barrier_in_loop, blocks, in, out);
}
int run_divergent_barrier(float* out, int fault) { LAUNCH_EITHER(divergent_barrier, 1, out); }
int run_barrier_and_shuffle(float* out, int fault) { LAUNCH_EITHER(barrier_and_shuffle, 1, out); }
int run_exited_lane(float* out, int fault) { LAUNCH_EITHER(exited_lane, 1, out); }
int run_mask_without_caller(float* out, int fault) { LAUNCH_EITHER(mask_without_caller, 1, out); }
int run_masks_differ(float* out, int fault) { LAUNCH_EITHER(masks_differ, 1, out); }
int run_calls_differ(float* out, int fault) { LAUNCH_EITHER(calls_differ, 1, out); }

int run_configuration(float* out, int grid_y, int threads) {
  BCM_LAUNCH(divergent_barrier<false>, dim3(1, grid_y), threads, 0, nullptr, out);
  return cudaGetLastError();
}

int run_read_global(const float* in, float* out, int shift) {
  BCM_LAUNCH(read_global, 1, kThreads, 0, nullptr, in, out, shift);
  return cudaGetLastError();
}
int run_read_static(const float* in, float* out, int shift) {
  BCM_LAUNCH(read_static, 1, kThreads, 0, nullptr, in, out, shift);
  return cudaGetLastError();
}
int run_read_dynamic(const float* in, float* out, int shift) {
  BCM_LAUNCH(read_dynamic, 1, kThreads, kThreads * sizeof(float), nullptr, in, out, shift);
  return cudaGetLastError();
}
int run_read_misaligned(const float* in, float* out, int shift) {
  BCM_LAUNCH(read_misaligned, 1, 1, 0, nullptr, in, out, shift);
  return cudaGetLastError();
}

}
