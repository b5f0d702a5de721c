// The CUDA launcher; returns 0 or a cudaError_t.
#pragma once

#include "upsample_add_relu/upsample_add_relu.h"

extern "C" int upsample_add_relu_cuda(const bcmfnet::UpsampleAddReLU* call, void* stream);
