// Marks arithmetic that the C++ and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define BCM_HD __host__ __device__ __forceinline__
#else
#define BCM_HD static inline
#endif
