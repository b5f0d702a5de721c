// Selection by rank among scores of 16 bits, without sorting and without an order among ties.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace bcmfnet {

// What is asked of a selection: candidates from tau on, but at least the part `ratio` of them and min_kept, and at most
// max_kept where there are so many (max_kept < 0: no limit). Ties at the threshold are all in.
struct Selection {
  double ratio;
  int64_t min_kept, max_kept;
  int32_t tau;
};

// Whether the threshold depends on the ranks of candidates; else it is tau.
BCM_HD bool by_rank(const Selection& selection) {
  return selection.ratio > 0 || selection.min_kept > 0 || selection.max_kept >= 0;
}

// How many candidates the threshold must let in: min(M, max(min_kept, floor(ratio * M))) of M.
BCM_HD int64_t kept_of(int64_t candidates, const Selection& selection) {
  const int64_t by_ratio = static_cast<int64_t>(floor(selection.ratio * static_cast<double>(candidates)));
  const int64_t kept = by_ratio > selection.min_kept ? by_ratio : selection.min_kept;
  return kept < candidates ? kept : candidates;
}

}  // namespace bcmfnet
