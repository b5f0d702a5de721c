// The arithmetic runs on vectors of positions of one output row (BclColumns). Where their logits come from, a chunk of
// planes or the source pixels around, is the template argument `Logits`.
#include "bcl/bcl_cpu.h"

#include <initializer_list>

#include "bcl/bcl_math.h"
#include "common/bilinear.h"
#include "common/planes.h"
#include "common/simd.h"

namespace bcmfnet::BCM_LEVEL {
namespace {

// Logits at full resolution: planes of kChunk columns.
struct Planes {
  const float* at_position;

  Float operator()(int64_t c) const { return load<Float>(at_position + c * kChunk); }
};

// Logits between two columns of source pixels, [classes, kLanes]: left + share * step.
struct Between {
  const float *left, *step;
  Float share;

  Float operator()(int64_t c) const { return load<Float>(left + c * kLanes) + share * load<Float>(step + c * kLanes); }
};

// The three labels of a pixel in two words, each as label + 1, or 0 where it does not count; and whether it is selected.
struct Labels {
  static constexpr int kBits = 13, kSelected = kBits;
  static constexpr int32_t kMask = (1 << kBits) - 1;
  static_assert(kMaxClasses <= kMask, "a label + 1 must fit its bits");
  Int own, others;

  // Of label + 1 both; without its own label a pixel does not count.
  static int32_t pack_others(int32_t own, int32_t rows, int32_t columns) {
    return own != 0 ? rows | columns << kBits : 0;
  }
  Int operator()(int which) const {
    return (which == 0 ? own & kMask : which == 1 ? others & kMask : others >> kBits) - 1;
  }
  Int selected() const { return own >> kSelected; }
};

Int lane_numbers() {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// Four chains: one alone would wait for its own comparisons.
template <typename Logits>
Float largest(const Logits& logits, int64_t classes) {
  constexpr int kChains = 4;
  Float best[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) best[i] = logits(i < classes ? i : 0);
  int64_t c = kChains;
  for (; c + kChains <= classes; c += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) best[i] = larger(best[i], logits(c + i));
  }
  for (; c < classes; ++c) best[0] = larger(best[0], logits(c));
  return larger(larger(best[0], best[1]), larger(best[2], best[3]));
}

float sum_of(Float value) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

// Scratch memory, handed out piece by piece.
struct Arena {
  int32_t* next;

  int32_t* integers(int64_t count) {
    int32_t* piece = next;
    next += count;
    return piece;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(integers(count)); }
};

// Class weights of labels that count, 0 of others.
Float weights_of(const Bcl& call, Int label) {
  const Int counts = label >= 0;
  const Float one = call.weight ? gather(call.weight, counts ? label : fill(0)) : fill(1.0f);
  return counts ? one : fill(0.0f);
}

// What the gradient takes from each label of kLanes pixels; of_ce and of_hard are the factors of the two terms.
Amounts<Float> amounts_of(const Bcl& call, const Labels& label, float of_ce, float of_hard) {
  const BclOptions& options = call.options;
  const Float w = weights_of(call, label(0));
  const Float hard = label.selected() != 0 ? w * of_hard : fill(0.0f);
  Amounts<Float> result;
  result.own = w * of_ce + options.terms[0] * hard;
  result.rows = label(1) >= 0 ? options.terms[1] * hard : fill(0.0f);
  result.columns = label(2) >= 0 ? options.terms[2] * hard : fill(0.0f);
  result.total = result.own + result.rows + result.columns;
  return result;
}

// kLanes pixels in hand.
struct Pixels {
  const Bcl& call;
  const Int lane = lane_numbers();
  float *below, *exps;  // [classes, kLanes]: z - max z, and its exponential where it is kept
  Float sum, log_sum;   // of the exponentials

  Pixels(const Bcl& call, Arena& arena) : call(call) {
    for (float** piece : {&below, &exps}) *piece = arena.floats(call.classes * kLanes);
  }

  template <bool kKeeps, typename Logits>
  void evaluate(const Logits& logits) {
    const Float best = largest(logits, call.classes);
    float *to_below = below, *to_exps = exps;
    Float total = fill(0.0f);
    for (int64_t c = 0; c < call.classes; ++c) {
      const Float difference = logits(c) - best, e = exp(difference);
      store(to_below + c * kLanes, difference, kLanes);
      if (kKeeps) store(to_exps + c * kLanes, e, kLanes);
      total += e;
    }
    sum = total, log_sum = log(total);
  }

  // 0 where the label does not count.
  Float cross_entropy(Int label) const {
    const Int counts = label >= 0;
    const Float value = log_sum - gather(below, (counts ? label : fill(0)) * kLanes + lane);
    return counts ? value : fill(0.0f);
  }

  // Sum of the cross-entropies that have a coefficient, of which the first is known.
  Float sum_of(const float* coefficients, const Labels& label, Float own) const {
    const Float rows = coefficients[1] != 0 ? cross_entropy(label(1)) : own;
    return weighted(coefficients, own, rows, coefficients[2] != 0 ? cross_entropy(label(2)) : own);
  }
};

// What is left of total * softmax, class by class, when the labels have taken theirs. Where nothing is taken it is 0,
// whatever the logits are.
struct Taking {
  const Int counts, own, rows, columns;
  const Amounts<Float> amounts;
  const bool flips;

  Taking(const Bcl& call, const Labels& label, const Amounts<Float>& amounts)
      : counts(amounts.total != 0.0f), own(label(0)), rows(label(1)), columns(label(2)), amounts(amounts),
        flips(call.options.terms[1] != 0 || call.options.terms[2] != 0) {}

  Float operator()(int64_t c, Float p) const {
    const int32_t label = static_cast<int32_t>(c);
    Float g = counts ? p : fill(0.0f);
    g = own == label ? g - amounts.own : g;
    if (!flips) return g;
    g = rows == label ? g - amounts.rows : g;
    return columns == label ? g - amounts.columns : g;
  }
};

// Gradient of the logits of kLanes pixels.
struct Gradient {
  const float* exps;
  const Float factor;
  const Taking taking;

  Gradient(const Pixels& pixels, const Labels& labels, const Amounts<Float>& amounts)
      : exps(pixels.exps), factor(amounts.total / pixels.sum), taking(pixels.call, labels, amounts) {}

  Float operator()(int64_t c) const { return taking(c, factor * load<Float>(exps + c * kLanes)); }
};

// One output row, by position.
struct Line {
  const Bcl& call;
  const BclColumns& columns;
  const BclMaps& maps;
  int64_t row = 0;           // of batch * out_height
  int32_t *own, *others;     // Labels
  int32_t* score;            // on the grid
  float *term, *lse;         // as in BclMaps
  int32_t *own_by_column, *others_by_column;  // Labels by column, and a 0 behind them
  Pixels pixels;             // at the positions in hand

  Line(const Bcl& call, const BclColumns& columns, const BclMaps& maps, Arena& arena)
      : call(call), columns(columns), maps(maps), pixels(call, arena) {
    for (int32_t** piece : {&own, &others, &score}) *piece = arena.integers(columns.positions());
    for (float** piece : {&term, &lse}) *piece = arena.floats(columns.positions());
    for (int32_t** piece : {&own_by_column, &others_by_column}) *piece = arena.integers(call.out_width + kMaxLanes);
  }

  void read_labels(int64_t image, int64_t y, bool selected);
  Labels labels(int64_t position) const { return {load<Int>(own + position), load<Int>(others + position)}; }
  template <bool kKeeps, typename Logits>
  void evaluate(const Logits& logits, int64_t position, BclRow& figures, Float& ce_sum);
  void write_maps() const;
  Float read_lse(int64_t position) const;
};

void Line::read_labels(int64_t image, int64_t y, bool selected) {
  const BclOptions& options = call.options;
  const int64_t width = call.out_width, first = image * call.out_height;
  row = first + y;
  const int16_t* labels = maps.labels + row * width;
  const int64_t other = flipped(y, call.out_height, options.step[0], options.offset[0], options.mirror);
  const int16_t* other_labels = maps.labels + (first + other) * width;
  for (int64_t x = 0; x < width; ++x) own_by_column[x] = labels[x] + 1;
  for (int64_t x = 0; x < width; ++x)
    others_by_column[x] =
        Labels::pack_others(own_by_column[x], other_labels[x] + 1, own_by_column[columns.flipped[x]]);
  if (selected)
    for (int64_t x = 0; x < width; ++x) own_by_column[x] |= maps.mask[row * width + x] << Labels::kSelected;
  own_by_column[width] = others_by_column[width] = 0;
  for (int64_t p = 0; p < columns.positions(); p += kLanes) {
    const Int column = load<Int>(columns.column + p);
    store(own + p, gather(own_by_column, column), kLanes);
    store(others + p, gather(others_by_column, column), kLanes);
  }
}

template <bool kKeeps, typename Logits>
void Line::evaluate(const Logits& logits, int64_t position, BclRow& figures, Float& ce_sum) {
  const BclOptions& options = call.options;
  pixels.evaluate<kKeeps>(logits);
  const Labels label = labels(position);
  const Float ce = pixels.cross_entropy(label(0)), w = weights_of(call, label(0));
  const Int heavy = w != 0.0f;
  ce_sum += heavy ? w * ce : fill(0.0f);
  if (maps.lse) store(lse + position, pixels.log_sum, kLanes);
  if (options.boundary_weight == 0) return;
  const Float s = pixels.sum_of(options.score, label, ce);
  figures.nan |= any(s != s);
  store(score + position, __builtin_convertvector(on_grid(s), Int), kLanes);
  if (!maps.term) return;
  store(term + position, heavy ? w * pixels.sum_of(options.terms, label, ce) : fill(0.0f), kLanes);
}

void Line::write_maps() const {
  const int64_t width = call.out_width, at = row * width;
  for (int64_t x = 0; maps.lse && x < width; ++x) maps.lse[at + x] = lse[columns.position[x]];
  if (call.options.boundary_weight == 0) return;
  for (int64_t x = 0; maps.term && x < width; ++x) maps.term[at + x] = term[columns.position[x]];
  for (int64_t x = 0; x < width; ++x) maps.score[at + x] = static_cast<uint16_t>(score[columns.position[x]]);
}

// log sum exp(z - max z) of kLanes positions.
Float Line::read_lse(int64_t position) const {
  const Int column = load<Int>(columns.column + position);
  return gather(maps.lse + row * call.out_width, column < static_cast<int32_t>(call.out_width) ? column : fill(0));
}

// Logits of kChunk columns of a row at full resolution, [classes, kChunk].
struct Chunk {
  const Bcl& call;
  float* planes;
  int64_t first = 0, count = 0;

  void read(int64_t image, int64_t y, int64_t x) {
    first = x;
    count = call.out_width - x < kChunk ? call.out_width - x : kChunk;
    const int64_t* stride = call.logits_stride;
    const int64_t at = image * stride[0] + y * stride[2] + x * stride[3];
    for (int64_t c = 0; c < call.classes; ++c) {
      float* plane = planes + c * kChunk;
      read_plane(call.logits_type, call.logits, at + c * stride[1], stride[3], count, plane);
      for (int64_t i = count; i < kChunk; ++i) plane[i] = 0;
    }
  }
};

// Two source rows, with the first and the last column repeated outside: cell k lies between the elements k and k + 1.
struct SourceRows {
  const Bcl& call;
  const int64_t pitch;
  float *top, *bottom, *left, *step;
  int64_t held = -1;  // the source row in `bottom`: of the next row of cells it is the upper one

  SourceRows(const Bcl& call, Arena& arena) : call(call), pitch(call.in_width + 2 * kMaxLanes) {
    top = arena.floats(call.classes * pitch), bottom = arena.floats(call.classes * pitch);
    left = arena.floats(call.classes * kLanes), step = arena.floats(call.classes * kLanes);
  }

  void read(int64_t image, int64_t row, float* planes) {
    const int64_t* stride = call.logits_stride;
    const int64_t at = image * stride[0] + row * stride[2];
    for (int64_t c = 0; c < call.classes; ++c) {
      float* plane = planes + c * pitch;
      read_plane(call.logits_type, call.logits, at + c * stride[1], stride[3], call.in_width, plane + 1);
      plane[0] = plane[1];
      for (int64_t x = call.in_width + 1; x < pitch; ++x) plane[x] = plane[call.in_width];
    }
  }

  // The row below is read too where there is one: it may be the same.
  void read_pair(int64_t image, int64_t row) {
    const int64_t unit = image * call.in_height + row;
    const int64_t below = high_of(row, call.in_height, call.out_height);
    if (held == unit) {
      float* const upper = bottom;
      bottom = top;
      top = upper;
    } else {
      read(image, row, top);
    }
    read(image, below, bottom);
    held = image * call.in_height + below;
  }

  // Logits at the borders of kLanes cells, at heights between the rows.
  void interpolate(int64_t cell, Float share) {
    for (int64_t c = 0; c < call.classes; ++c) {
      const float *upper = top + c * pitch + cell, *lower = bottom + c * pitch + cell;
      const Float a = load<Float>(upper), b = load<Float>(upper + 1);
      const Float from = a + share * (load<Float>(lower) - a), to = b + share * (load<Float>(lower + 1) - b);
      store(left + c * kLanes, from, kLanes);
      store(step + c * kLanes, to - from, kLanes);
    }
  }
};

// Whether there is a source row below.
bool has_below(const Bcl& call, int64_t row) { return high_of(row, call.in_height, call.out_height) != row; }

// Call each(y, share of the source row below) for the output rows of a row of cells.
template <typename Each>
void each_output_row(const Bcl& call, int64_t row, Each each) {
  const int64_t end = first_output(row + 1, call.in_height, call.out_height);
  for (int64_t y = first_output(row, call.in_height, call.out_height); y < end; ++y)
    each(y, has_below(call, row) ? share_of(y, row, call.in_height, call.out_height) : 0.0f);
}

// Gradient of the corners of a row of cells, [classes, pitch] each.
struct Corners {
  const Bcl& call;
  const int64_t pitch;
  float *top_left, *top_right, *bottom_left, *bottom_right;
  float *sum, *right;  // [classes, kLanes]: of the row in hand, over the columns of a cell: all, and the right shares

  Corners(const Bcl& call, int64_t pitch, Arena& arena) : call(call), pitch(pitch) {
    for (float** piece : {&top_left, &top_right, &bottom_left, &bottom_right})
      *piece = arena.floats(call.classes * pitch);
    for (float** piece : {&sum, &right}) *piece = arena.floats(call.classes * kLanes);
  }

  void clear() { std::memset(top_left, 0, 4 * call.classes * pitch * sizeof(float)); }
  void clear_row() { std::memset(sum, 0, 2 * call.classes * kLanes * sizeof(float)); }

  // Add pixels at the same place of kLanes cells to the row in hand.
  void add_position(const Gradient& gradient, Float share) {
    for (int64_t c = 0; c < call.classes; ++c) {
      const Float g = gradient(c);
      store(sum + c * kLanes, load<Float>(sum + c * kLanes) + g, kLanes);
      store(right + c * kLanes, load<Float>(right + c * kLanes) + share * g, kLanes);
    }
  }

  void add_row(int64_t cell, float share) {
    for (int64_t c = 0; c < call.classes; ++c) {
      const Float b = load<Float>(right + c * kLanes), a = load<Float>(sum + c * kLanes) - b;
      const int64_t at = c * pitch + cell;
      store(top_left + at, load<Float>(top_left + at) + (1 - share) * a, kLanes);
      store(top_right + at, load<Float>(top_right + at) + (1 - share) * b, kLanes);
      store(bottom_left + at, load<Float>(bottom_left + at) + share * a, kLanes);
      store(bottom_right + at, load<Float>(bottom_right + at) + share * b, kLanes);
    }
  }

  // Add pixels anywhere in kLanes cells.
  void add_pixels(const Gradient& gradient, int64_t cell, Float share, Float down) {
    for (int64_t c = 0; c < call.classes; ++c) {
      const Float g = gradient(c), b = share * g, a = g - b;
      const Float lower_a = down * a, lower_b = down * b;
      const int64_t at = c * pitch + cell;
      store(top_left + at, load<Float>(top_left + at) + (a - lower_a), kLanes);
      store(top_right + at, load<Float>(top_right + at) + (b - lower_b), kLanes);
      store(bottom_left + at, load<Float>(bottom_left + at) + lower_a, kLanes);
      store(bottom_right + at, load<Float>(bottom_right + at) + lower_b, kLanes);
    }
  }

  // Source pixel j is the right border of cell j and the left one of cell j + 1.
  void write(const float* lefts, const float* rights, int64_t c, bool adds, float* to) const {
    const float *a = lefts + c * pitch, *b = rights + c * pitch;
    for (int64_t x = 0; x < call.in_width; ++x) to[x] = (adds ? to[x] : 0.0f) + (a[x + 1] + b[x]);
    to[0] += a[0];
    to[call.in_width - 1] += b[call.in_width];
  }

  // Write what a row of cells gives to the source rows around it, or add it to what is there.
  void write(int64_t image, int64_t row, bool adds, float* gradient, float* lower) const {
    const int64_t width = call.in_width;
    for (int64_t c = 0; c < call.classes; ++c) {
      write(top_left, top_right, c, adds, gradient + ((image * call.classes + c) * call.in_height + row) * width);
      write(bottom_left, bottom_right, c, adds, lower + ((image * call.in_height + row) * call.classes + c) * width);
    }
  }
};

// Call each(x) where a byte of a row is not 0; most are.
template <typename Each>
void each_marked(const uint8_t* marks, int64_t width, Each each) {
  constexpr int64_t kStep = 8;
  for (int64_t x = 0; x < width; x += kStep) {
    uint64_t some = 1;
    if (x + kStep <= width) std::memcpy(&some, marks + x, kStep);
    if (some == 0) continue;
    for (int64_t i = x; i < x + kStep && i < width; ++i)
      if (marks[i]) each(i);
  }
}

// The selected pixels of some output rows inside a row of cells, listed for each cell.
struct Selected {
  const Bcl& call;
  const BclColumns& columns;
  const BclMaps& maps;
  const bool flips;       // whether the flipped labels are targets too
  int32_t* count;         // [pitch]: pixels of a cell
  int32_t *own, *others;  // [listed, pitch]: Labels
  float *right, *down;    // [listed, pitch]: shares of the source pixels to the right and below

  Selected(const Bcl& call, const BclColumns& columns, const BclMaps& maps, Arena& arena)
      : call(call), columns(columns), maps(maps), flips(call.options.terms[1] != 0 || call.options.terms[2] != 0) {
    const int64_t size = listed_rows(columns) * columns.positions();
    count = arena.integers(columns.pitch), own = arena.integers(size), others = arena.integers(size);
    right = arena.floats(size), down = arena.floats(size);
    clear();
  }

  void clear() { std::memset(count, 0, columns.pitch * sizeof(int32_t)); }

  void add_row(int64_t image, int64_t y, float share) {
    const BclOptions& options = call.options;
    const int64_t row = image * call.out_height + y;
    const int64_t other = flipped(y, call.out_height, options.step[0], options.offset[0], options.mirror);
    const int16_t* labels = maps.labels + row * call.out_width;
    const int16_t* rows = labels + (other - y) * call.out_width;
    each_marked(maps.mask + row * call.out_width, call.out_width, [&](int64_t x) {
      const int64_t position = columns.position[x], cell = columns.cell[x];
      const int64_t at = count[cell]++ * columns.pitch + cell;
      own[at] = (labels[x] + 1) | 1 << Labels::kSelected;
      if (flips) others[at] = Labels::pack_others(labels[x] + 1, rows[x] + 1, labels[columns.flipped[x]] + 1);
      right[at] = columns.share[position], down[at] = share;
    });
  }

  // Call each(cell, labels, right, down) for one pixel of each of kLanes cells at a time, as long as one has any left.
  template <typename Each>
  void each_vector(Each each) const {
    for (int64_t cell = 0; cell < columns.pitch; cell += kLanes) {
      const Int counts = load<Int>(count + cell);
      int64_t at = cell;
      for (int32_t i = 0; any(counts > i); ++i, at += columns.pitch) {
        const Int listed = counts > i;
        const Int none = fill(0), own_label = listed ? load<Int>(own + at) : none;
        const Labels labels{own_label, flips ? (listed ? load<Int>(others + at) : none) : none};
        const Float zero = fill(0.0f);
        each(cell, labels, listed ? load<Float>(right + at) : zero, listed ? load<Float>(down + at) : zero);
      }
    }
  }
};

template <typename T>
BclRow read_labels(const Bcl& call, const T* from, int16_t* to) {
  BclRow row{};
  for (int64_t x = 0; x < call.out_width; ++x) {
    const int64_t label = from[x * call.target_stride[2]];
    const bool valid = label != call.options.ignore_index, known = label >= 0 && label < call.classes;
    to[x] = valid && known ? static_cast<int16_t>(label) : -1;
    row.valid += valid;
    row.wrong_label |= valid && !known;
    if (call.weight && valid && known) row.weight += call.weight[label];
  }
  if (!call.weight) row.weight = static_cast<double>(row.valid);
  return row;
}

}  // namespace

void bcl_labels(const Bcl& call, const BclMaps& maps, int64_t begin, int64_t end, BclRow* rows) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / call.out_height, y = row % call.out_height;
    const int64_t at = image * call.target_stride[0] + y * call.target_stride[1];
    int16_t* to = maps.labels + row * call.out_width;
    switch (call.target_type) {
      case DType::kUInt8: rows[row] = read_labels(call, static_cast<const uint8_t*>(call.target) + at, to); break;
      case DType::kInt16: rows[row] = read_labels(call, static_cast<const int16_t*>(call.target) + at, to); break;
      case DType::kInt32: rows[row] = read_labels(call, static_cast<const int32_t*>(call.target) + at, to); break;
      default: rows[row] = read_labels(call, static_cast<const int64_t*>(call.target) + at, to); break;
    }
  }
}

void bcl_scores(
    const Bcl& call, const BclColumns& columns, const BclMaps& maps, int64_t begin, int64_t end, BclRow* units,
    void* scratch) {
  Arena arena{static_cast<int32_t*>(scratch)};
  Line line(call, columns, maps, arena);
  Chunk chunk{call, arena.floats(call.classes * kChunk)};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / call.in_height, y = unit % call.in_height;
    line.read_labels(image, y, false);
    for (int64_t x = 0; x < call.out_width; x += kChunk) {
      Float ce = fill(0.0f);  // of a chunk: a float that adds up a long row loses digits
      chunk.read(image, y, x);
      for (int64_t i = 0; i < chunk.count; i += kLanes)
        line.evaluate<false>(Planes{chunk.planes + i}, x + i, units[unit], ce);
      units[unit].ce += sum_of(ce);
    }
    line.write_maps();
  }
}

void bcl_low_scores(
    const Bcl& call, const BclColumns& columns, const BclMaps& maps, float* gradient, float* lower, int64_t begin,
    int64_t end, BclRow* units, void* scratch) {
  const bool differentiates = gradient && call.options.ce_weight != 0;
  Arena arena{static_cast<int32_t*>(scratch)};
  Line line(call, columns, maps, arena);
  SourceRows source(call, arena);
  Corners corners(call, columns.pitch, arena);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / call.in_height, row = unit % call.in_height;
    source.read_pair(image, row);
    if (gradient) corners.clear();
    each_output_row(call, row, [&](int64_t y, float down) {
      line.read_labels(image, y, false);
      for (int64_t cell = 0; cell < columns.pitch; cell += kLanes) {
        Float ce = fill(0.0f);
        source.interpolate(cell, fill(down));
        if (differentiates) corners.clear_row();
        for (int64_t at = cell; at < columns.positions(); at += columns.pitch) {
          if (!any(line.labels(at).own)) {  // nothing counts, such as in the half cells at the sides
            store(line.score + at, fill(0), kLanes);
            continue;
          }
          const Float right = load<Float>(columns.share + at);
          const Between logits{source.left, source.step, right};
          if (differentiates) {
            line.evaluate<true>(logits, at, units[unit], ce);
            corners.add_position({line.pixels, line.labels(at), amounts_of(call, line.labels(at), 1, 0)}, right);
          } else {
            line.evaluate<false>(logits, at, units[unit], ce);
          }
        }
        if (differentiates) corners.add_row(cell, down);
        units[unit].ce += sum_of(ce);
      }
      line.write_maps();
    });
    if (gradient) corners.write(image, row, false, gradient, lower);
  }
}

void bcl_candidates(
    const Bcl& call, const BclMaps& maps, int64_t begin, int64_t end, uint32_t* histogram, void* scratch) {
  const int64_t width = call.out_width, reach = call.options.nms / 2;
  const int64_t side = reach < width ? reach : width;
  uint16_t* column_best = static_cast<uint16_t*>(scratch) + side;  // with `side` zeros on either side
  uint16_t* best = column_best + width + side;
  for (int64_t i = 1; i <= side; ++i) column_best[-i] = column_best[width + i - 1] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = row % call.out_height;
    const uint16_t* scores = maps.score + row * width;
    uint8_t* mask = maps.mask + row * width;
    const int64_t above = y < reach ? y : reach;
    const int64_t below = call.out_height - 1 - y < reach ? call.out_height - 1 - y : reach;
    std::memcpy(column_best, scores, width * sizeof(uint16_t));
    for (int64_t j = -above; j <= below; ++j)
      for (int64_t x = 0; x < width; ++x) {
        const uint16_t other = scores[j * width + x];
        column_best[x] = other > column_best[x] ? other : column_best[x];
      }
    std::memcpy(best, column_best, width * sizeof(uint16_t));
    for (int64_t i = -side; i <= side; ++i)
      for (int64_t x = 0; x < width; ++x) best[x] = column_best[x + i] > best[x] ? column_best[x + i] : best[x];
    for (int64_t x = 0; x < width; ++x) mask[x] = scores[x] == best[x] && scores[x] != 0;
    uint32_t* bins = histogram + (call.options.per_image ? row / call.out_height : 0) * (kMaxScore + 1);
    each_marked(mask, width, [&](int64_t x) { ++bins[scores[x]]; });
  }
}

void bcl_select(
    const Bcl& call, const BclMaps& maps, const int32_t* thresholds, int64_t begin, int64_t end, BclRow* rows) {
  for (int64_t row = begin; row < end; ++row) {
    const int32_t threshold = thresholds[call.options.per_image ? row / call.out_height : 0];
    const int64_t at = row * call.out_width;
    each_marked(maps.mask + at, call.out_width, [&](int64_t x) {
      const bool selected = maps.score[at + x] >= threshold;
      maps.mask[at + x] = selected;
      rows[row].selected += selected;
      if (selected && maps.term) rows[row].boundary += maps.term[at + x];
    });
  }
}

void bcl_gradient(
    const Bcl& call, const BclColumns& columns, const BclMaps& maps, const float* scales, float grad, void* gradient,
    const int64_t* stride, int64_t begin, int64_t end, void* scratch) {
  Arena arena{static_cast<int32_t*>(scratch)};
  Line line(call, columns, maps, arena);
  Chunk chunk{call, arena.floats(call.classes * kChunk)};
  const float of_ce = call.options.ce_weight * scales[0], of_hard = call.options.boundary_weight * scales[1];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / call.in_height, y = unit % call.in_height;
    line.read_labels(image, y, call.options.boundary_weight != 0);
    for (int64_t x = 0; x < call.out_width; x += kChunk) {
      chunk.read(image, y, x);
      for (int64_t i = 0; i < chunk.count; i += kLanes) {
        float* const planes = chunk.planes + i;
        const Planes logits{planes};
        const Labels labels = line.labels(x + i);
        const Amounts<Float> amounts = amounts_of(call, labels, of_ce, of_hard);
        const Taking taking(call, labels, amounts);
        const Float best = largest(logits, call.classes), factor = amounts.total * exp(-line.read_lse(x + i));
        for (int64_t c = 0; c < call.classes; ++c)
          store(planes + c * kChunk, taking(c, factor * exp(logits(c) - best)), kLanes);
      }
      if (call.classes == 1) std::memset(chunk.planes, 0, kChunk * sizeof(float));  // of NaN too
      const int64_t at = image * stride[0] + y * stride[2] + x * stride[3];
      for (int64_t c = 0; c < call.classes; ++c)
        write_plane(
            call.logits_type, gradient, at + c * stride[1], stride[3], chunk.count, grad, chunk.planes + c * kChunk);
    }
  }
}

void bcl_low_selected(
    const Bcl& call, const BclColumns& columns, const BclMaps& maps, float factor, float* gradient, float* lower,
    int64_t begin, int64_t end, BclRow* units, void* scratch) {
  Arena arena{static_cast<int32_t*>(scratch)};
  Selected selected(call, columns, maps, arena);
  SourceRows source(call, arena);
  Pixels pixels(call, arena);
  Corners corners(call, columns.pitch, arena);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / call.in_height, row = unit % call.in_height;
    Float boundary;
    const auto evaluate = [&](int64_t cell, const Labels& labels, Float right, Float down) {
      source.interpolate(cell, down);
      pixels.evaluate<true>(Between{source.left, source.step, right});
      const Float w = weights_of(call, labels(0));
      const Float terms = pixels.sum_of(call.options.terms, labels, pixels.cross_entropy(labels(0)));
      boundary += w != 0.0f ? w * terms : fill(0.0f);
      if (!gradient) return;
      corners.add_pixels({pixels, labels, amounts_of(call, labels, 0, factor)}, cell, right, down);
    };
    source.read_pair(image, row);
    if (gradient) corners.clear();
    const auto take_listed = [&] {
      boundary = fill(0.0f);
      selected.each_vector(evaluate);
      selected.clear();
      units[unit].boundary += sum_of(boundary);
    };
    int64_t listed = 0;
    each_output_row(call, row, [&](int64_t y, float down) {
      selected.add_row(image, y, down);
      if (++listed % listed_rows(columns) == 0) take_listed();
    });
    take_listed();
    if (gradient) corners.write(image, row, true, gradient, lower);
  }
}

void bcl_add_lower(
    const Bcl& call, float factor, const float* lower, float* gradient, int64_t begin, int64_t end) {
  const int64_t width = call.in_width;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / call.in_height, row = unit % call.in_height;
    const bool adds = row > 0 && has_below(call, row - 1);
    for (int64_t c = 0; c < call.classes; ++c) {
      float* to = gradient + ((image * call.classes + c) * call.in_height + row) * width;
      const float* from = lower + ((unit - 1) * call.classes + c) * width;
      for (int64_t x = 0; x < width; ++x)
        to[x] = call.classes == 1 ? 0.0f : factor * (to[x] + (adds ? from[x] : 0.0f));
    }
  }
}

}  // namespace bcmfnet::BCM_LEVEL
