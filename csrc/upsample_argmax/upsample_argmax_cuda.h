// The CUDA launcher; returns 0 or a cudaError_t.
#pragma once

#include "upsample_argmax/upsample_argmax.h"

extern "C" int upsample_argmax_cuda(const bcmfnet::UpsampleArgmax* call, void* stream);
