// The CUDA launchers; they return 0 or a cudaError_t.
#pragma once

#include "upsample_add_relu/upsample_add_relu.h"

extern "C" int upsample_add_relu_cuda(const bcmfnet::UpsampleAddReLU* call, void* stream);
extern "C" int upsample_add_relu_backward_cuda(const bcmfnet::UpsampleAddReLUBackward* call, void* stream);
