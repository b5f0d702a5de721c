// What every .cu file starts from: the launch of a kernel, and dynamic shared memory. No torch header.
#pragma once

#include <cuda_runtime.h>

#ifndef BCM_CUDA_ON_CPU  // tests/cuda_on_cpu/cuda_runtime.h brings its own

#define BCM_LAUNCH(kernel, grid, block, smem, stream, ...) \
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

#define BCM_DYNAMIC_SHARED(type, name)                                   \
  extern __shared__ __align__(16) unsigned char bcm_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(bcm_dynamic_shared)

#endif
