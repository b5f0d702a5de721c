// The text of an error for the bindings, which include no CUDA header.
#include <cuda_runtime.h>

extern "C" const char* bcmfnet_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
