// The CPU kernel, compiled once for each level of instruction sets.
#pragma once

#include <cstdint>

#include "common/levels.h"
#include "lmfm/lmfm.h"

namespace bcmfnet {

// Runs body(context, begin, end, scratch) over ranges of [0, count) on several threads. `work` is the elementary steps
// of one of them; `scratch` is `floats` floats for the body alone.
using Body = void (*)(const void* context, int64_t begin, int64_t end, float* scratch);
using Parallel = void (*)(int64_t count, int64_t work, int64_t floats, Body body, const void* context);

// Bytes, aligned to 64, that a call works in.
BCM_DECLARE(int64_t lmfm_scratch_bytes(const Lmfm& call))

BCM_DECLARE(void lmfm_write(const Lmfm& call, void* scratch, Parallel parallel))

}  // namespace bcmfnet
