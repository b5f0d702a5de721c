// The CUDA launcher; returns 0 or a cudaError_t.
#pragma once

#include "stem_conv/stem_conv.h"

extern "C" int stem_conv_cuda(const bcmfnet::StemConv* call, void* stream);
