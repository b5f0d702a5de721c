// The CPU kernel, compiled once for each level of instruction sets.
#pragma once

#include <cstdint>

#include "common/levels.h"
#include "upsample_argmax/upsample_argmax.h"

namespace bcmfnet {

constexpr int kMaxLanes = 16;

// Sources of the output columns, followed by kMaxLanes repetitions of the last.
struct Columns {
  const int32_t* low;
  const float* share;
};

// 32-bit words of scratch memory that one thread needs.
inline int64_t scratch_words(const UpsampleArgmax& call) {
  const int64_t pitch = call.in_width + kMaxLanes;
  return pitch * (2 * call.classes + (call.classes + 31) / 32 + 1) + call.classes;
}

// Write the labels of rows of cells [begin, end) of batch * in_height.
BCM_DECLARE(void upsample_argmax_cells(
    const UpsampleArgmax& call, const Columns& columns, int64_t begin, int64_t end, void* scratch))

}  // namespace bcmfnet
