// Scratch memory: a kernel lays out what it works in as pieces of one allocation.
#pragma once

#include <cstdint>

#include "common/integers.h"

namespace bcmfnet {

// Hands out pieces of `memory`, each aligned to 256 bytes. Without memory it only counts what a layout needs.
struct Arena {
  char* memory;
  int64_t bytes = 0;

  // Always inline: of a function that two instruction sets share the linker would keep one copy, see simd.h.
  template <typename T>
  __attribute__((always_inline)) T* take(int64_t count) {
    T* const piece = memory != nullptr ? reinterpret_cast<T*>(memory + bytes) : nullptr;
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }
};

}  // namespace bcmfnet
