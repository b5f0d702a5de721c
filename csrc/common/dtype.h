// Element types as numbers that cross the boundary between a binding and a kernel.
#pragma once

#include <cstdint>

namespace bcmfnet {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kUInt8, kInt16, kInt32, kInt64 };

}  // namespace bcmfnet
