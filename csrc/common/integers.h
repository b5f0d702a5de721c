// Arithmetic of sizes.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace bcmfnet {

BCM_HD int64_t ceil_div(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
BCM_HD int64_t round_up(int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; }

template <typename T>
BCM_HD T smaller_of(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
BCM_HD T larger_of(T a, T b) {
  return a > b ? a : b;
}

}  // namespace bcmfnet
