// A kernel that keeps 96 sums in registers: with fewer of them it spills. Shows that the test of spills can fail.
#include "common/launch.h"

namespace {

constexpr int kSums = 96;

__global__ void pressure(const float* in, float* out, int n) {
  float sums[kSums] = {};
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float value = in[i];
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = fmaf(value, in[k], sums[k] * value);
  }
#pragma unroll
  for (int k = 0; k < kSums; ++k) out[threadIdx.x * kSums + k] = sums[k];
}

}  // namespace

extern "C" int run_pressure(const float* in, float* out, int n) {
  BCM_LAUNCH(pressure, 1, 128, 0, nullptr, in, out, n);
  return cudaGetLastError();
}
