// A warp's matrix product c += a @ b of [16, 16] and [16, 8], through the fragments that csrc/common/cuda/mma.h describes.
#include "common/launch.h"
#include "common/cuda/mma.h"

namespace {

__device__ uint32_t pair(const unsigned short* low, const unsigned short* high) {
  return *low | static_cast<uint32_t>(*high) << 16;
}

template <typename T>
__global__ void multiply(const unsigned short* a, const unsigned short* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t rows[4], columns[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const unsigned short* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    rows[i] = pair(at, at + 1);
  }
  for (int i = 0; i < 2; ++i) {
    const unsigned short* at = b + (2 * t + i * 8) * 8 + g;
    columns[i] = pair(at, at + 8);
  }
  for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  bcmfnet::multiply_add<T>(sums, rows, columns);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

}  // namespace

extern "C" {

int multiply_float16(const unsigned short* a, const unsigned short* b, float* c) {
  BCM_LAUNCH(multiply<__half>, 1, 32, 0, nullptr, a, b, c);
  return cudaGetLastError();
}
int multiply_bfloat16(const unsigned short* a, const unsigned short* b, float* c) {
  BCM_LAUNCH(multiply<__nv_bfloat16>, 1, 32, 0, nullptr, a, b, c);
  return cudaGetLastError();
}

}
