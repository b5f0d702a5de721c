// What the kernels of csrc may come to use, and tests/cuda_on_cpu does not model.
#include <cstdint>

#include <cuda_fp16.h>

#include "common/launch.h"

namespace {

// 16 bytes a thread, and 4 of which those of the upper half of a warp are zeros; then parts of 8x8 matrices of halves.
__global__ void copied(const uint4* in, const uint32_t* words, uint4* out) {
  __shared__ uint4 rows[32];
  __shared__ uint32_t tile[32];
  const auto shared = [](const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); };
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(rows + threadIdx.x)), "l"(in + threadIdx.x));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared(tile + threadIdx.x)),
               "l"(words + threadIdx.x), "r"(threadIdx.x < 16 ? 4 : 0));
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  uint32_t r[4], t[2];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared(rows + threadIdx.x)));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(t[0]), "=r"(t[1]) : "r"(shared(rows + threadIdx.x % 16)));
  out[2 * threadIdx.x] = make_uint4(r[0], r[1], r[2], r[3]);
  out[2 * threadIdx.x + 1] = make_uint4(t[0], t[1], tile[threadIdx.x], 0);
}

__global__ void packed(const uint32_t* a, const uint32_t* b, uint32_t* out) {
  const uint32_t x = a[threadIdx.x], y = b[threadIdx.x];
  uint32_t* const to = out + 7 * threadIdx.x;
  to[0] = __vmaxu2(x, y), to[1] = __vminu2(x, y), to[2] = __vmaxs2(x, y), to[3] = __vadd2(x, y);
  to[4] = static_cast<uint32_t>(static_cast<int32_t>(x << 20) >> 20);
  const __half2 p = *reinterpret_cast<const __half2*>(&x), q = *reinterpret_cast<const __half2*>(&y);
  to[5] = __hlt(__low2half(p), __high2half(q)) ? x : y;
  to[6] = __vmaxu2(__vmaxu2(x, y), a[threadIdx.x ^ 1]);  // of three at once
}

// What follows another launch as soon as that allows it.
__global__ void dependent(const float* in, float* out) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float log, inverse;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(in[threadIdx.x]));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(in[threadIdx.x]));
  out[2 * threadIdx.x] = log, out[2 * threadIdx.x + 1] = inverse;
}

}  // namespace

extern "C" int run_copied(const uint4* in, const uint32_t* words, uint4* out) {
  BCM_LAUNCH(copied, 1, 32, 0, nullptr, in, words, out);
  return cudaGetLastError();
}
extern "C" int run_packed(const uint32_t* a, const uint32_t* b, uint32_t* out) {
  BCM_LAUNCH(packed, 1, 32, 0, nullptr, a, b, out);
  return cudaGetLastError();
}
extern "C" int run_dependent(const float* in, float* out) {
  cudaLaunchAttribute follows{};
  follows.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  follows.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = 1, config.blockDim = 32, config.attrs = &follows, config.numAttrs = 1;
  BCM_TRY(cudaLaunchKernelEx(&config, dependent, in, out));
  return cudaGetLastError();
}
