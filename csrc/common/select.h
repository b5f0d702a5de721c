// Selection by rank on a histogram of 16-bit scores: no sorting, no order among ties.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace bcmfnet {

constexpr int kScores = 65536;

// The rank-th largest of the scores that a histogram [kScores] counts, rank >= 1 and at most their number.
inline int32_t kth_largest(const uint32_t* histogram, int64_t rank) {
  int32_t score = kScores - 1;
  for (int64_t at_least = histogram[score]; at_least < rank;) at_least += histogram[--score];
  return score;
}

// What is asked of a selection: candidates from tau on, but at least the share `ratio` of them and min_kept, and at
// most max_kept where there are so many (max_kept < 0: no limit). Ties at the threshold are all in.
struct Selection {
  double ratio;
  int64_t min_kept, max_kept;
  int32_t tau;
};

// How many candidates the threshold must let in: min(M, max(min_kept, floor(ratio * M))) of M.
BCM_HD int64_t kept_of(int64_t candidates, const Selection& selection) {
  const int64_t share = static_cast<int64_t>(floor(selection.ratio * static_cast<double>(candidates)));
  const int64_t kept = share > selection.min_kept ? share : selection.min_kept;
  return kept < candidates ? kept : candidates;
}

// The score from which candidates are selected: min(tau, kept-th largest), tau where none must be let in; at least the
// max_kept-th largest where there are so many.
inline int32_t select_threshold(const uint32_t* histogram, const Selection& selection) {
  int64_t candidates = 0;
  for (int score = 0; score < kScores; ++score) candidates += histogram[score];
  const int64_t kept = kept_of(candidates, selection);
  int32_t threshold = selection.tau;
  if (kept > 0) {
    const int32_t kth = kth_largest(histogram, kept);
    threshold = kth < threshold ? kth : threshold;
  }
  if (selection.max_kept >= 0 && selection.max_kept <= candidates) {
    const int32_t kth = kth_largest(histogram, selection.max_kept);
    threshold = kth > threshold ? kth : threshold;
  }
  return threshold;
}

}  // namespace bcmfnet
