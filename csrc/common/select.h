// Selection by rank on a histogram of 16-bit scores: no sorting, no order among ties.
#pragma once

#include <cmath>
#include <cstdint>

namespace bcmfnet {

constexpr int kScores = 65536;

// The rank-th largest of the scores that a histogram [kScores] counts, rank >= 1 and at most their number.
inline int32_t kth_largest(const uint32_t* histogram, int64_t rank) {
  int32_t score = kScores - 1;
  for (int64_t at_least = histogram[score]; at_least < rank;) at_least += histogram[--score];
  return score;
}

// The score from which candidates are selected: t = min(tau, K-th largest), K = min(M, max(min_kept, floor(ratio * M)))
// of M candidates; tau where K is 0; at least the max_kept-th largest where there are so many (max_kept < 0: no limit).
inline int32_t select_threshold(
    const uint32_t* histogram, int32_t tau, double ratio, int64_t min_kept, int64_t max_kept) {
  int64_t candidates = 0;
  for (int score = 0; score < kScores; ++score) candidates += histogram[score];
  int64_t kept = static_cast<int64_t>(std::floor(ratio * static_cast<double>(candidates)));
  kept = kept > min_kept ? kept : min_kept;
  kept = kept < candidates ? kept : candidates;
  int32_t threshold = tau;
  if (kept > 0) {
    const int32_t kth = kth_largest(histogram, kept);
    threshold = kth < tau ? kth : tau;
  }
  if (max_kept >= 0 && max_kept <= candidates) {
    const int32_t kth = kth_largest(histogram, max_kept);
    threshold = kth > threshold ? kth : threshold;
  }
  return threshold;
}

}  // namespace bcmfnet
