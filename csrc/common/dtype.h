// Element types as numbers that cross the boundary between a binding and a kernel.
#pragma once

#include <cstdint>

namespace bcmfnet {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kUInt8, kInt16, kInt32, kInt64 };

// Returns call(T()) of the one among three types that stands for a floating-point element type. It is inlined
// always, since planes are read 64 elements at a time.
template <typename Float32, typename Float16, typename BFloat16, typename Call>
__attribute__((always_inline)) static inline auto dispatch_float(DType type, Call call) {
  switch (type) {
    case DType::kFloat16: return call(Float16());
    case DType::kBFloat16: return call(BFloat16());
    default: return call(Float32());
  }
}

}  // namespace bcmfnet
