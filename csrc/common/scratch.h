// Memory that a kernel works in: not cleared, aligned to the lines of a cache.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace bcmfnet {

constexpr std::align_val_t kLine{64};

struct FreeScratch {
  void operator()(float* memory) const { operator delete(memory, kLine); }
};

using Scratch = std::unique_ptr<float, FreeScratch>;

inline Scratch make_scratch(int64_t floats) {
  return Scratch(static_cast<float*>(operator new(sizeof(float) * static_cast<size_t>(floats), kLine)));
}

}  // namespace bcmfnet
