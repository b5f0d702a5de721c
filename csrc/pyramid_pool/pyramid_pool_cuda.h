// The CUDA launchers; they return 0 or a cudaError_t, and never wait for the device.
#pragma once

#include "pyramid_pool/pyramid_pool.h"

extern "C" int pyramid_pool_cuda(const bcmfnet::PyramidPool* call, void* stream);

extern "C" int pyramid_pool_backward_cuda(const bcmfnet::PyramidPool* call, void* stream);
