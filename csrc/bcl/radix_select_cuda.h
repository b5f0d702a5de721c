// Radix select on a GPU, selection by rank without sorting, order or waiting: 16-bit scores are counted by their high
// byte, then those that share the high byte of a wanted rank by their low byte. (Alabi et al., "Fast k-selection
// algorithms for graphics processing units", ACM JEA 17, 2012.) All functions are called by whole warps.
#pragma once

#include <cstdint>

#include "bcl/selection.h"
#include "common/cuda/grid.h"

namespace bcmfnet {

constexpr int kBins = 256;       // of one byte
constexpr int kSoughtBytes = 3;  // high bytes whose scores are counted by their low byte too

// Counts of candidates: by the high byte, and by the low byte of those with one of the sought high bytes. Where no rank
// decides, the selected ones are all counted in the first bin.
struct Histogram {
  uint32_t high[kBins], low[kSoughtBytes][kBins];
};

// Number of scores in the bins from `first` on.
__device__ inline int64_t count_from(const uint32_t* bins, int first) {
  int64_t count = 0;
  for (int bin = threadIdx.x % 32; bin < kBins; bin += 32) count += bin >= first ? bins[bin] : 0;
  for (int lanes = 16; lanes > 0; lanes /= 2) count += __shfl_xor_sync(kFullWarp, count, lanes);
  return count;
}

// The bin of the rank-th largest score, and its rank in there; bin -1 for rank 0. There are at least `rank` scores.
struct Place {
  int bin;
  int64_t rank;
};

__device__ inline Place place_of(const uint32_t* bins, int64_t rank) {
  if (rank <= 0) return {-1, 0};
  constexpr int kEach = kBins / 32;
  const int lane = threadIdx.x % 32, top = kBins - 1 - lane * kEach;
  int64_t above = 0;  // scores in the bins of this lane, then also of those before it
  for (int i = 0; i < kEach; ++i) above += bins[top - i];
  const int64_t own = above;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int64_t before = __shfl_up_sync(kFullWarp, above, lanes);
    above += lane >= lanes ? before : 0;
  }
  const int holder = __ffs(__ballot_sync(kFullWarp, above >= rank)) - 1;
  Place place{top, rank - (above - own)};
  for (int i = 0; i < kEach - 1 && place.rank > bins[place.bin]; ++i) place.rank -= bins[place.bin--];
  return {__shfl_sync(kFullWarp, place.bin, holder), __shfl_sync(kFullWarp, place.rank, holder)};
}

// The high bytes of the scores that may become the threshold, in the order of Histogram::low.
struct Sought {
  Place kept, most;
  int tau;

  __device__ Sought(const Histogram& histogram, const Selection& selection) : tau(selection.tau >> 8) {
    const int64_t candidates = count_from(histogram.high, 0);
    kept = place_of(histogram.high, kept_of(candidates, selection));
    const bool limited = selection.max_kept >= 0 && selection.max_kept <= candidates;
    most = place_of(histogram.high, limited ? selection.max_kept : 0);
  }
  __device__ int byte(int which) const { return which == 0 ? kept.bin : which == 1 ? most.bin : tau; }
};

// The score from which candidates are selected, as threshold_of in selection_cpu.cpp has it, and how many that are.
struct Threshold {
  int score;
  int64_t selected;

  __device__ Threshold(const Histogram& histogram, const Selection& selection) : score(selection.tau) {
    if (!by_rank(selection)) {
      selected = histogram.high[0];
      return;
    }
    const Sought sought(histogram, selection);
    int which = 2;
    const auto score_of = [&](int i, const Place& place) {
      return place.bin < 0 ? -1 : place.bin << 8 | place_of(histogram.low[i], place.rank).bin;
    };
    const int kept = score_of(0, sought.kept), most = score_of(1, sought.most);
    if (kept >= 0 && kept < score) score = kept, which = 0;
    if (most > score) score = most, which = 1;
    selected = count_from(histogram.high, (score >> 8) + 1) + count_from(histogram.low[which], score & (kBins - 1));
  }
};

}  // namespace bcmfnet
