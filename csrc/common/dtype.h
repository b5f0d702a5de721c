// Element types as numbers that cross the boundary between a binding and a kernel.
#pragma once

#include <cstdint>

namespace bcmfnet {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace bcmfnet
