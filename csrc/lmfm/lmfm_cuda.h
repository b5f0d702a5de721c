// The CUDA launcher; it returns 0 or a cudaError_t, and never waits for the device.
#pragma once

#include "lmfm/lmfm.h"

// Bytes of device memory that a call works in.
extern "C" int64_t lmfm_scratch_bytes_cuda(const bcmfnet::Lmfm* call);

extern "C" int lmfm_cuda(const bcmfnet::Lmfm* call, void* scratch, void* stream);
