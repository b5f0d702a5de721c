// The room of the selection: labels are not looked at any more, only scores.
#include "bcl/bcl_math.h"
#include "bcl/rooms_cpu.h"
#include "common/arena.h"

namespace bcmfnet::BCM_ISA {
namespace {

// The largest scores of the windows around the pixels of a row: over columns of the map, then over the row.
struct Windows {
  const int64_t height, width, reach, side;
  uint16_t* column_best;  // [width], with `side` zeros on either side
  uint16_t* best;         // [width]

  Windows(const Bcl& call, Arena& arena)
      : height(call.target.height), width(call.target.width), reach(call.options.nms / 2),
        side(smaller_of(reach, width)), column_best(arena.take<uint16_t>(width + 2 * side)),
        best(arena.take<uint16_t>(width)) {}

  void clear_sides() {
    std::memset(column_best, 0, side * sizeof(uint16_t));
    column_best += side;
    std::memset(column_best + width, 0, side * sizeof(uint16_t));
  }

  // Of row y of an image, whose scores are given.
  void find(int64_t y, const uint16_t* scores) const {
    const int64_t above = smaller_of(y, reach), below = smaller_of(height - 1 - y, reach);
    std::memcpy(column_best, scores, width * sizeof(uint16_t));
    for (int64_t j = -above; j <= below; ++j)
      for (int64_t x = 0; x < width; ++x) {
        const uint16_t other = scores[j * width + x];
        column_best[x] = other > column_best[x] ? other : column_best[x];
      }
    std::memcpy(best, column_best, width * sizeof(uint16_t));
    for (int64_t i = -side; i <= side; ++i)
      for (int64_t x = 0; x < width; ++x) best[x] = column_best[x + i] > best[x] ? column_best[x + i] : best[x];
  }
};

// The rank-th largest of the scores that a histogram [kScores] counts, rank >= 1 and at most their number.
int32_t kth_largest(const uint32_t* histogram, int64_t rank) {
  int32_t score = kScores - 1;
  for (int64_t at_least = histogram[score]; at_least < rank;) at_least += histogram[--score];
  return score;
}

// The score from which candidates are selected: min(tau, kept-th largest), tau where none must be let in; at least the
// max_kept-th largest where there are so many.
int32_t threshold_of(const uint32_t* histogram, const Selection& selection) {
  int64_t candidates = 0;
  for (int score = 0; score < kScores; ++score) candidates += histogram[score];
  const int64_t kept = kept_of(candidates, selection);
  int32_t threshold = selection.tau;
  if (kept > 0) threshold = smaller_of(threshold, kth_largest(histogram, kept));
  if (selection.max_kept >= 0 && selection.max_kept <= candidates)
    threshold = larger_of(threshold, kth_largest(histogram, selection.max_kept));
  return threshold;
}

}  // namespace

bool chosen_are_enough(const Run& run) {
  const int64_t units = run.call.options.per_image ? run.call.logits.height : run.units;
  for (int64_t first = 0; first < run.units; first += units) {
    int64_t selected = 0, candidates = 0;
    for (int64_t i = first; i < first + units; ++i)
      selected += run.by_unit[i].selected, candidates += run.by_unit[i].candidates;
    if (selected < kept_of(candidates, run.call.options.selection)) return false;
  }
  return true;
}

// Non-maximum suppression, to the mask, and where ranks decide counts of the candidates by score. A range of rows counts
// for itself first.
void find_candidates(const Run& run) {
  const Bcl& call = run.call;
  const bool ranked = by_rank(call.options.selection);
  const int64_t bins = ranked ? run.thresholds_count() * kScores : 0;
  const int64_t height = call.target.height, width = call.target.width;
  if (ranked) std::memset(run.histogram, 0, bins * sizeof(uint32_t));
  Arena needed{nullptr};
  needed.take<uint32_t>(bins), Windows(call, needed);
  run.parallel_rows(needed.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    uint32_t* const own = arena.take<uint32_t>(bins);
    std::memset(own, 0, bins * sizeof(uint32_t));
    Windows windows(call, arena);
    windows.clear_sides();
    for (int64_t row = begin; row < end; ++row) {
      const uint16_t* scores = run.maps.score + row * width;
      uint8_t* mask = run.maps.mask + row * width;
      windows.find(row % height, scores);
      for (int64_t x = 0; x < width; ++x) mask[x] = scores[x] == windows.best[x] && scores[x] != 0;
      if (!ranked) continue;
      uint32_t* const counts = own + (call.options.per_image ? row / height : 0) * kScores;
      each_marked(mask, width, [&](int64_t x) { ++counts[scores[x]]; });
    }
    for (int64_t bin = 0; bin < bins; bin += kLanes) {
      if (!any(load<Int>(own + bin))) continue;
      for (int64_t i = bin; i < bin + kLanes; ++i) __atomic_fetch_add(&run.histogram[i], own[i], __ATOMIC_RELAXED);
    }
  });
}

// Thresholds, and of the candidates those that reach them: mask, number and boundary term. The mask leaves out those
// that are known since they were scored.
void select(const Run& run) {
  const Bcl& call = run.call;
  const int64_t height = call.target.height, width = call.target.width;
  const Selection& selection = call.options.selection;
  const int32_t known = decides(call) ? selection.tau : kScores;
  for (int64_t i = 0; i < run.thresholds_count(); ++i)
    run.thresholds[i] = by_rank(selection) ? threshold_of(run.histogram + i * kScores, selection) : selection.tau;
  run.parallel_rows(0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t threshold = run.thresholds[call.options.per_image ? row / height : 0];
      const int64_t at = row * width;
      each_marked(run.maps.mask + at, width, [&](int64_t x) {
        const int32_t score = run.maps.score[at + x];
        const bool selected = score >= threshold;
        run.maps.mask[at + x] = selected && score < known;
        run.by_row[row].selected += selected;
        if (selected && run.maps.term) run.by_row[row].boundary += run.maps.term[at + x];
      });
    }
  });
}

}  // namespace bcmfnet::BCM_ISA
