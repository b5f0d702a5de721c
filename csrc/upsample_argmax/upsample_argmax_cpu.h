// The CPU kernel, compiled once for each instruction set.
#pragma once

#include "common/isa.h"
#include "common/parallel.h"
#include "upsample_argmax/upsample_argmax.h"

namespace bcmfnet {

BCM_DECLARE(void upsample_argmax_cpu(const UpsampleArgmax& call, Parallel parallel))

}  // namespace bcmfnet
