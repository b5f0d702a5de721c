// Which positions a window of a pool covers, for C++ and CUDA alike. A window reaches `padding` to either side of
// `stride` times its number, within the map; the global average is one window that reaches everything.
#pragma once

#include "common/host_device.h"

namespace bcmfnet {

template <typename Integer>
struct Range {
  Integer begin, end;
};

// Positions that a window covers along an axis of `size`.
template <typename Integer>
BCM_HD Range<Integer> covered_by(Integer window, Integer stride, Integer padding, Integer size) {
  const Integer middle = window * stride;
  return {middle > padding ? middle - padding : 0, middle < size - padding ? middle + padding + 1 : size};
}

// Windows, of `count`, that cover a position.
template <typename Integer>
BCM_HD Range<Integer> covering(Integer position, Integer stride, Integer padding, Integer count) {
  const Integer end = (position + padding) / stride + 1;
  return {position > padding ? (position - padding + stride - 1) / stride : 0, end < count ? end : count};
}

}  // namespace bcmfnet
