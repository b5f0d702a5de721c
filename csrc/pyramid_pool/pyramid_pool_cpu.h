// The CPU kernels, compiled once for each level of instruction sets.
#pragma once

#include <cstdint>

#include "common/levels.h"
#include "pyramid_pool/pyramid_pool.h"

namespace bcmfnet {

// Tasks are blocks of channels of one image; this many of them.
BCM_DECLARE(int64_t pyramid_pool_tasks(const PyramidPool& call))

// Floats, aligned to 64 bytes, that a thread works in.
BCM_DECLARE(int64_t pyramid_pool_scratch(const PyramidPool& call))

// Write the pooled maps, or the gradient, of tasks [begin, end).
BCM_DECLARE(void pyramid_pool_blocks(const PyramidPool& call, int64_t begin, int64_t end, float* scratch))
BCM_DECLARE(void pyramid_pool_backward_blocks(const PyramidPool& call, int64_t begin, int64_t end, float* scratch))

}  // namespace bcmfnet
