// One row of cells at a time: the output rows between two source rows. The source rows become planes of floats, each
// cell gets the set of classes that can win in it, and each vector of output columns evaluates the union of its cells'
// sets for several output rows at once, in registers.
#include "upsample_argmax/upsample_argmax_cpu.h"

#include <utility>

#include "common/arena.h"
#include "common/bilinear.h"
#include "common/rows.h"
#include "common/simd.h"
#include "upsample_argmax/upsample_argmax_math.h"

namespace bcmfnet::BCM_ISA {
namespace {

// The registers hold the scores and labels of so many output rows: 16 of 32 registers, or 8 of 16.
constexpr int kRows = kLanes == 16 ? 8 : 4;

struct Winners;
struct Block;

struct Cells {
  const UpsampleArgmax& call;
  const int64_t classes, in_width, pitch, words;
  const int right;      // from a source column to its neighbour: 0 where the width is kept
  float *top, *bottom;  // [classes, pitch]: the two source rows
  int32_t* sets;        // [words, pitch]: bit c % 32 of word c / 32 is set where class c can win in a cell
  int32_t* has_nan;     // [pitch]: all bits where a corner of a cell is NaN
  int32_t* candidates;  // [classes]: the classes that one vector of columns evaluates
  int32_t* left;        // [out_width + kLanes]: the left source column of an output column; the last one is repeated
  float* weight;        // [out_width + kLanes]: of the right source column

  Cells(const UpsampleArgmax& call, Arena& arena)
      : call(call), classes(call.logits.channels), in_width(call.logits.width), pitch(in_width + kLanes),
        words(ceil_div(classes, 32)), right(in_width < call.out_width), top(arena.take<float>(classes * pitch)),
        bottom(arena.take<float>(classes * pitch)), sets(arena.take<int32_t>(words * pitch)),
        has_nan(arena.take<int32_t>(pitch)), candidates(arena.take<int32_t>(classes)),
        left(arena.take<int32_t>(call.out_width + kLanes)), weight(arena.take<float>(call.out_width + kLanes)) {}

  void find_sources() const;
  void read_row(int64_t image, int64_t row, float* planes) const;
  void find_sets() const;
  int64_t find_candidates(int64_t begin, int64_t end) const;
  template <bool kNaN>
  Winners evaluate(const Block& block, int64_t count) const;
  void write_labels(Int label, int64_t at, int lanes) const;
  void write_confidence(const Block& block, const Winners& best, int64_t at, int rows, int lanes) const;
  void write_rows(int64_t image, int64_t row, int64_t begin, int rows) const;
};

void Cells::find_sources() const {
  for (int64_t x = 0; x < call.out_width + kLanes; ++x) {
    const Source source = source_of(smaller_of(x, call.out_width - 1), in_width, call.out_width);
    left[x] = static_cast<int32_t>(source.low);
    weight[x] = source.weight;
  }
}

void Cells::read_row(int64_t image, int64_t row, float* planes) const {
  const View& logits = call.logits;
  for (int64_t c = 0; c < classes; ++c) {
    float* plane = planes + c * pitch;
    const int64_t at = offset_of(logits, image, c, row);
    read_plane(logits.dtype, logits.data, at, logits.column_stride, in_width, plane);
    for (int64_t x = 0; x < in_width; ++x) plane[x] = finite(plane[x]);
    for (int x = 0; x < kLanes; ++x) plane[in_width + x] = plane[in_width - 1];
  }
}

struct Corners {
  Float a, b, c, d;

  Corners(const float* top, const float* bottom, int right)
      : a(load<Float>(top)), b(load<Float>(top + right)), c(load<Float>(bottom)), d(load<Float>(bottom + right)) {}
  Float smallest() const { return smaller(smaller(a, b), smaller(c, d)); }
  Float largest() const { return larger(larger(a, b), larger(c, d)); }
  Int is_nan() const {
    const Float sum = a + b + c + d;
    return sum != sum;
  }
};

void Cells::find_sets() const {
  for (int64_t x = 0; x < in_width; x += kLanes) {
    Float bound = fill(-kInfinity);
    for (int64_t c = 0; c < classes; ++c)
      bound = larger(bound, Corners(top + c * pitch + x, bottom + c * pitch + x, right).smallest());
    Int nan = fill(0);
    for (int64_t word = 0; word < words; ++word) {
      Int set = fill(0);
      const int64_t end = 32 * (word + 1) < classes ? 32 * (word + 1) : classes;
      for (int64_t c = 32 * word; c < end; ++c) {
        const Corners corners(top + c * pitch + x, bottom + c * pitch + x, right);
        const Int is_nan = corners.is_nan();
        set |= ((corners.largest() >= bound) | is_nan) & static_cast<int32_t>(uint32_t{1} << c % 32);
        nan |= is_nan;
      }
      store(sets + word * pitch + x, set, kLanes);
    }
    store(has_nan + x, nan, kLanes);
  }
}

// Columns of output between neighbouring source columns: a + weight * (b - a).
struct Expand {
  Int index;
  Float weight;
  int right;

  Float operator()(const float* row) const {
    const Float a = permute(load<Float>(row), index), b = permute(load<Float>(row + right), index);
    return a + weight * (b - a);
  }
};

// The best scores and their classes of kLanes columns of kRows output rows.
struct Winners {
  Float score[kRows];
  Int label[kRows];
};

// The four corners' columns, and the weights of the lower source row, of kLanes columns of kRows output rows.
struct Block {
  Expand expand;
  const float *upper, *lower;
  const Float* weight;
};

template <bool kNaN>
Winners Cells::evaluate(const Block& block, int64_t count) const {
  Winners best;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    best.score[r] = fill(-2 * kInfinity);
    best.label[r] = fill(candidates[0]);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = candidates[i];
    const Float score = block.expand(block.upper + c * pitch), step = block.expand(block.lower + c * pitch) - score;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Float value = score + block.weight[r] * step;
      const Int takes = kNaN ? ~(value <= best.score[r]) & (best.score[r] == best.score[r]) : value > best.score[r];
      best.score[r] = takes ? value : best.score[r];
      best.label[r] = takes ? fill(candidates[i]) : best.label[r];
    }
  }
  return best;
}

void Cells::write_confidence(const Block& block, const Winners& best, int64_t at, int rows, int lanes) const {
  Float sum[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = fill(0.0f);
  for (int64_t c = 0; c < classes; ++c) {
    const Float score = block.expand(block.upper + c * pitch), step = block.expand(block.lower + c * pitch) - score;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] += exp(score + block.weight[r] * step - best.score[r]);
  }
  for (int r = 0; r < rows; ++r)
    store(call.confidence + at + r * call.out_width, __builtin_convertvector(half_bits(1.0f / sum[r]), Short), lanes);
}

void Cells::write_labels(Int label, int64_t at, int lanes) const {
  if (call.wide) {
    store(static_cast<int16_t*>(call.labels) + at, __builtin_convertvector(label, Short), lanes);
  } else {
    store(static_cast<uint8_t*>(call.labels) + at, __builtin_convertvector(label, Byte), lanes);
  }
}

// The classes that can win in one of the cells [begin, end], in `candidates`; their number.
int64_t Cells::find_candidates(int64_t begin, int64_t end) const {
  int64_t count = 0;
  for (int64_t word = 0; word < words; ++word) {
    uint32_t set = 0;
    for (int64_t cell = begin; cell <= end; ++cell) set |= static_cast<uint32_t>(sets[word * pitch + cell]);
    for (; set != 0; set &= set - 1) candidates[count++] = static_cast<int32_t>(32 * word + __builtin_ctz(set));
  }
  return count;
}

// Output rows [begin, begin + rows) of one row of cells.
void Cells::write_rows(int64_t image, int64_t row, int64_t begin, int rows) const {
  Float weights[kRows] = {};
  for (int r = 0; r < rows; ++r) weights[r] = fill(lerp_weight(begin + r, row, call.logits.height, call.out_height));
  for (int64_t x = 0; x < call.out_width; x += kLanes) {
    const int lanes = call.out_width - x < kLanes ? static_cast<int>(call.out_width - x) : kLanes;
    const int64_t cell = left[x], last_cell = left[x + lanes - 1];
    const int64_t count = find_candidates(cell, last_cell);
    const int64_t at = (image * call.out_height + begin) * call.out_width + x;
    if (count == 1 && call.confidence == nullptr) {
      for (int r = 0; r < rows; ++r) write_labels(fill(candidates[0]), at + r * call.out_width, lanes);
      continue;
    }
    Int nan = fill(0);
    for (int64_t i = cell; i <= last_cell; ++i) nan |= has_nan[i];
    const Expand expand{load<Int>(left + x) - left[x], load<Float>(weight + x), right};
    const Block block{expand, top + cell, bottom + cell, weights};
    const Winners best = any(nan) ? evaluate<true>(block, count) : evaluate<false>(block, count);
    for (int r = 0; r < rows; ++r) write_labels(best.label[r], at + r * call.out_width, lanes);
    if (call.confidence != nullptr) write_confidence(block, best, at, rows, lanes);
  }
}

}  // namespace

// A task is a row of cells.
void upsample_argmax_cpu(const UpsampleArgmax& call, Parallel parallel) {
  const int64_t in_height = call.logits.height, out_height = call.out_height;
  const int64_t work = call.logits.channels * call.out_width * out_height / in_height;
  Arena count{nullptr};
  Cells(call, count);
  const int64_t tasks = call.logits.batch * in_height;
  parallel_tasks(parallel, tasks, work, count.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    Cells cells(call, arena);
    cells.find_sources();
    int64_t held = -1;  // the source row in the lower planes: for the next row of cells it is the upper one
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / in_height, row = task % in_height;
      const int64_t below = high_of(row, in_height, out_height);
      if (held == task) {
        std::swap(cells.top, cells.bottom);
      } else {
        cells.read_row(image, row, cells.top);
      }
      cells.read_row(image, below, cells.bottom);
      held = image * in_height + below;
      cells.find_sets();
      const int64_t last = first_output(row + 1, in_height, out_height);
      for (int64_t y = first_output(row, in_height, out_height); y < last; y += kRows)
        cells.write_rows(image, row, y, static_cast<int>(smaller_of<int64_t>(last - y, kRows)));
    }
  });
}

}  // namespace bcmfnet::BCM_ISA
