// What every .cu file starts from: the launch of a kernel, and dynamic shared memory. No torch header.
#pragma once

#ifdef BCM_CUDA_ON_CPU
#include "runtime.h"  // tests/cuda_on_cpu
#else
#include <cuda_runtime.h>

#define BCM_LAUNCH(kernel, grid, block, smem, stream, ...) \
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define BCM_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif
