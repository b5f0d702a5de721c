// Division by a number that is the same in a whole launch: a product and a shift, in place of some 20 instructions.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace bcmfnet {

// Of 0 <= number < 2^31 by 1 <= divisor < 2^31. With 2^(shift - 1) < divisor <= 2^shift, the multiplier is
// 2^32 (2^shift - divisor) / divisor, rounded down, + 1: the quotient is then exact.
struct Divisor {
  unsigned divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(static_cast<unsigned>(by)), shift(0) {
    while (uint64_t{1} << shift < divisor) ++shift;
    const uint64_t rest = (uint64_t{1} << shift) - divisor;
    multiplier = static_cast<unsigned>((rest << 32) / divisor + 1);
  }

  __device__ int quotient(int number) const {
    const unsigned n = static_cast<unsigned>(number);
    return static_cast<int>((__umulhi(n, multiplier) + n) >> shift);
  }
  __device__ int remainder(int number, int quotient) const {
    return number - quotient * static_cast<int>(divisor);
  }
};

}  // namespace bcmfnet
