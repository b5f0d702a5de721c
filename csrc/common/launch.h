// What every .cu file starts from: the launch of a kernel, its errors, and dynamic shared memory. No torch header.
#pragma once

#include <cuda_runtime.h>

// Return the error of a call of the runtime where there is one. The runtime is made to forget it: the next launch that
// asks for the last error would find it.
#define BCM_TRY(call)                                         \
  do {                                                        \
    if (const int bcm_error = static_cast<int>(call)) {       \
      static_cast<void>(cudaGetLastError());                  \
      return bcm_error;                                       \
    }                                                         \
  } while (false)

#ifndef BCM_CUDA_ON_CPU  // tests/cuda_on_cpu/cuda_runtime.h brings its own

#define BCM_LAUNCH(kernel, grid, block, smem, stream, ...) \
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

#define BCM_DYNAMIC_SHARED(type, name)                                   \
  extern __shared__ __align__(16) unsigned char bcm_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(bcm_dynamic_shared)

#endif
