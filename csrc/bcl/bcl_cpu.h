// The CPU kernels, compiled once for each instruction set. Any number of threads gives the same bits.
#pragma once

#include "bcl/bcl.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace bcmfnet {

// Bytes that a call works in.
BCM_DECLARE(int64_t bcl_forward_bytes_cpu(const Bcl& call, bool saves))
BCM_DECLARE(int64_t bcl_backward_bytes_cpu(const Bcl& call))

// Whether every label is a class or ignore_index; if not, nothing is written.
BCM_DECLARE(bool bcl_forward_cpu(
    const Bcl& call, const BclOutputs& outputs, bool saves, void* scratch, Parallel parallel))

// The gradient of a call at full resolution, times `grad`. It may lie in the logits' own memory.
BCM_DECLARE(void bcl_backward_cpu(
    const Bcl& call, const BclSaved& saved, const View& gradient, void* scratch, Parallel parallel))

}  // namespace bcmfnet
