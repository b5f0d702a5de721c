// The CUDA launchers; they return 0 or a cudaError_t, and never wait for the device.
#pragma once

#include <cstdint>

#include "bcl/bcl.h"

// Bytes of device memory that a forward works in.
extern "C" int64_t bcl_scratch_bytes_cuda(const bcmfnet::Bcl* call, bool saves);

extern "C" int bcl_forward_cuda(
    const bcmfnet::Bcl* call, const bcmfnet::BclOutputs* outputs, void* scratch, bool saves, void* stream);

// Gradient of a call at full resolution, of the logits' type and of any strides. It may lie
// in the logits' own memory if it has their strides.
extern "C" int bcl_backward_cuda(
    const bcmfnet::Bcl* call, const bcmfnet::BclSaved* saved, const bcmfnet::View* gradient, void* stream);
