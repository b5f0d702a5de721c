// The CPU kernels, compiled once for each instruction set.
#pragma once

#include "common/isa.h"
#include "common/parallel.h"
#include "pyramid_pool/pyramid_pool.h"

namespace bcmfnet {

BCM_DECLARE(void pyramid_pool_cpu(const PyramidPool& call, Parallel parallel))
BCM_DECLARE(void pyramid_pool_backward_cpu(const PyramidPool& call, Parallel parallel))

}  // namespace bcmfnet
