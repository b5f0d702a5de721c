// The CPU kernel, compiled once for each instruction set.
#pragma once

#include "common/isa.h"
#include "common/parallel.h"
#include "lmfm/lmfm.h"

namespace bcmfnet {

// Bytes that a call works in.
BCM_DECLARE(int64_t lmfm_scratch_bytes_cpu(const Lmfm& call))

BCM_DECLARE(void lmfm_cpu(const Lmfm& call, void* scratch, Parallel parallel))

}  // namespace bcmfnet
