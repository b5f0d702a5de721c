// Per-pixel arithmetic of upsample_argmax, for C++ and CUDA alike.
//
// The output pixels that interpolate the same four source pixels form a cell. In exact arithmetic a bilinear value lies
// between the smallest and the largest of its cell's corners, so a class whose largest corner is under another class's
// smallest one cannot win there: it is not evaluated. (In float32 the two may come closer than a rounding: a tie.)
#pragma once

#include "common/host_device.h"

namespace bcmfnet {

constexpr float kInfinity = 1e38f;  // infinities count as this: differences and multiples of them are then numbers

BCM_HD float finite(float x) { return x > kInfinity ? kInfinity : x < -kInfinity ? -kInfinity : x; }

// Whether a score takes the place of the best of the classes before it: NaN beats numbers, the first NaN stays.
BCM_HD bool beats(float score, float best) { return !(score <= best) && best == best; }

}  // namespace bcmfnet
