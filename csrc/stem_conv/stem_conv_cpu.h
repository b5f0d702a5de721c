// The CPU kernel, compiled once for each instruction set.
#pragma once

#include "common/isa.h"
#include "common/parallel.h"
#include "stem_conv/stem_conv.h"

namespace bcmfnet {

BCM_DECLARE(void stem_conv_cpu(const StemConv& call, Parallel parallel))

}  // namespace bcmfnet
