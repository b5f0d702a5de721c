// What the threads of a warp tell each other.
#include "common/launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <typename T>
__global__ void shuffle(const T* in, T* out, int kind, int argument, int width) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const T value = in[i];
  switch (kind) {
    case 0: out[i] = __shfl_sync(kAll, value, argument, width); break;
    case 1: out[i] = __shfl_up_sync(kAll, value, argument, width); break;
    case 2: out[i] = __shfl_down_sync(kAll, value, argument, width); break;
    case 3: out[i] = __shfl_xor_sync(kAll, value, argument, width); break;
  }
}

// Two halves that have parted each make calls of their own: the sum of 8 even lanes, and the largest of 16 lanes.
__global__ void parted(const int* in, int* out) {
  const int lane = threadIdx.x % 32, value = in[threadIdx.x];
  int result = value;
  if (lane < 16) {
    if (lane % 2 == 0) {
      for (int step = 8; step > 1; step /= 2) result += __shfl_xor_sync(0x5555u, result, step);
    }
  } else {
    result = __reduce_max_sync(0xffff0000u, value);
  }
  __syncwarp();
  out[threadIdx.x] = result + 1000 * __shfl_sync(kAll, result, 31);
}

__global__ void vote(const int* in, unsigned* ballot, int* any, int* all) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  ballot[i] = __ballot_sync(kAll, in[i]);
  any[i] = __any_sync(kAll, in[i]);
  all[i] = __all_sync(kAll, in[i]);
}

// Seven results a lane: add, min, max of int, then min of unsigned, and, or, xor.
__global__ void reduce(const int* in, int* out) {
  const int value = in[threadIdx.x];
  const unsigned bits = static_cast<unsigned>(value);
  int* mine = out + 7 * threadIdx.x;
  mine[0] = __reduce_add_sync(kAll, value);
  mine[1] = __reduce_min_sync(kAll, value);
  mine[2] = __reduce_max_sync(kAll, value);
  mine[3] = static_cast<int>(__reduce_min_sync(kAll, bits));
  mine[4] = static_cast<int>(__reduce_and_sync(kAll, bits));
  mine[5] = static_cast<int>(__reduce_or_sync(kAll, bits));
  mine[6] = static_cast<int>(__reduce_xor_sync(kAll, bits));
}

// Each warp turned around through shared memory.
template <bool kBarrier>
__global__ void turn(const int* in, int* out) {
  __shared__ int tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 31];
}

template <typename T>
int shuffle_all(const T* in, T* out, int n, int kind, int argument, int width) {
  BCM_LAUNCH(shuffle<T>, n / 64, 64, 0, nullptr, in, out, kind, argument, width);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

int shuffle_int32(const int* in, int* out, int n, int kind, int argument, int width) {
  return shuffle_all(in, out, n, kind, argument, width);
}
int shuffle_int64(const long long* in, long long* out, int n, int kind, int argument, int width) {
  return shuffle_all(in, out, n, kind, argument, width);
}
int shuffle_float32(const float* in, float* out, int n, int kind, int argument, int width) {
  return shuffle_all(in, out, n, kind, argument, width);
}
int shuffle_float64(const double* in, double* out, int n, int kind, int argument, int width) {
  return shuffle_all(in, out, n, kind, argument, width);
}

int parted_halves(const int* in, int* out) {
  BCM_LAUNCH(parted, 1, 64, 0, nullptr, in, out);
  return cudaGetLastError();
}

int vote_warp(const int* in, unsigned* ballot, int* any, int* all, int n) {
  BCM_LAUNCH(vote, n / 64, 64, 0, nullptr, in, ballot, any, all);
  return cudaGetLastError();
}

int reduce_warp(const int* in, int* out) {
  BCM_LAUNCH(reduce, 1, 32, 0, nullptr, in, out);
  return cudaGetLastError();
}

int turn_warp(const int* in, int* out, int barrier) {
  if (barrier) {
    BCM_LAUNCH(turn<true>, 1, 64, 0, nullptr, in, out);
  } else {
    BCM_LAUNCH(turn<false>, 1, 64, 0, nullptr, in, out);
  }
  return cudaGetLastError();
}

}
