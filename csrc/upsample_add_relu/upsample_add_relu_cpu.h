// The CPU kernels, compiled once for each instruction set.
#pragma once

#include "common/isa.h"
#include "common/parallel.h"
#include "upsample_add_relu/upsample_add_relu.h"

namespace bcmfnet {

BCM_DECLARE(void upsample_add_relu_cpu(const UpsampleAddReLU& call, Parallel parallel))
BCM_DECLARE(void upsample_add_relu_backward_cpu(const UpsampleAddReLUBackward& call, Parallel parallel))

}  // namespace bcmfnet
