// The CPU kernel, compiled once for each level of instruction sets.
#pragma once

#include <cstdint>

#include "common/levels.h"
#include "upsample_add_relu/upsample_add_relu.h"

namespace bcmfnet {

// Tasks are rows of the result, of all channels where these are innermost, else of one; this many of them.
BCM_DECLARE(int64_t upsample_add_relu_tasks(const UpsampleAddReLU& call))

// Floats, aligned to 64 bytes, that a thread works in.
BCM_DECLARE(int64_t upsample_add_relu_scratch(const UpsampleAddReLU& call))

// Write the rows of tasks [begin, end).
BCM_DECLARE(void upsample_add_relu_rows(const UpsampleAddReLU& call, int64_t begin, int64_t end, float* scratch))

}  // namespace bcmfnet
