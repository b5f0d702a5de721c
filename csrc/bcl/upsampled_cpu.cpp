// The room of upsampled logits: the output rows between two source rows, cell by cell.
#include <utility>

#include "bcl/line_cpu.h"
#include "common/bilinear.h"

namespace bcmfnet::BCM_ISA {
namespace {

// Planes of a call: of its classes, and where labels are smoothed one of their sum with the weights that are spread.
int64_t planes_of(const Bcl& call) { return classes_of(call) + (call.options.smoothing != 0); }

// Logits between two columns of source pixels, [planes, kLanes]: left + weight * step.
struct Between {
  const float *left, *step;
  Float weight;

  Float operator()(int64_t c) const { return load<Float>(left + c * kLanes) + weight * load<Float>(step + c * kLanes); }

  // sum_c w[c] (z - best)
  Float spread(const SpreadWeights& weights, int64_t classes, Float best) const {
    return (*this)(classes) - weights.sum * best;
  }
};

int64_t below(const Bcl& call, int64_t row) { return high_of(row, call.logits.height, call.target.height); }

// Two source rows, with the first and the last column repeated outside: cell k lies between the elements k and k + 1.
// Of binary logits the first class has zeros.
struct SourceRows {
  const Bcl& call;
  const View& logits;
  const float* spread;  // the weights of the classes in the sum, see planes_of
  const int64_t classes, planes, pitch;
  float *top, *bottom, *left, *step;
  int64_t held = -1;  // the source row in `bottom`: of the next row of cells it is the upper one

  SourceRows(const Run& run, const View& logits, Arena& arena)
      : call(run.call), logits(logits), spread(run.spread.of_class), classes(classes_of(call)),
        planes(planes_of(call)), pitch(logits.width + 2 * kLanes) {
    for (float** piece : {&top, &bottom}) *piece = arena.take<float>(planes * pitch);
    for (float** piece : {&left, &step}) *piece = arena.take<float>(planes * kLanes);
  }

  void read(int64_t image, int64_t row, float* to) {
    const int64_t first = classes - logits.channels;
    if (first > 0) std::memset(to, 0, first * pitch * sizeof(float));
    for (int64_t c = 0; c < logits.channels; ++c) {
      float* plane = to + (first + c) * pitch;
      const int64_t at = offset_of(logits, image, c, row);
      read_plane(logits.dtype, logits.data, at, logits.column_stride, logits.width, plane + 1);
      plane[0] = plane[1];
      for (int64_t x = logits.width + 1; x < pitch; ++x) plane[x] = plane[logits.width];
    }
    if (planes > classes) add_up(to, to + classes * pitch);
  }

  void add_up(const float* from, float* sum) {
    std::memset(sum, 0, pitch * sizeof(float));
    for (int64_t c = 0; c < classes; ++c, from += pitch)
      for (int64_t x = 0; spread[c] != 0 && x < pitch; ++x) sum[x] += spread[c] * from[x];
  }

  // The row below is read too where there is one: it may be the same.
  void read_pair(int64_t image, int64_t row) {
    const int64_t unit = image * call.logits.height;
    if (held == unit + row) {
      std::swap(top, bottom);
    } else {
      read(image, row, top);
    }
    read(image, below(call, row), bottom);
    held = unit + below(call, row);
  }

  // Logits at the borders of kLanes cells, at heights between the rows.
  void interpolate(int64_t cell, Float weight) {
    for (int64_t c = 0; c < planes; ++c) {
      const float *upper = top + c * pitch + cell, *lower = bottom + c * pitch + cell;
      const Float a = load<Float>(upper), b = load<Float>(upper + 1);
      const Float from = a + weight * (load<Float>(lower) - a), to = b + weight * (load<Float>(lower + 1) - b);
      store(left + c * kLanes, from, kLanes);
      store(step + c * kLanes, to - from, kLanes);
    }
  }

  Between between(Float weight) const { return {left, step, weight}; }
};

// The softmax of pixels that follow each other in kLanes cells, whose logits have equal steps: each exponential is the
// one before times a ratio. For a gradient alone, since a cross-entropy would lose digits.
struct Progression {
  static constexpr int64_t kSteps = 8;     // so many pixels share one exponential
  static constexpr float kLargest = 30.0f;  // difference of a class across a cell: what underflows before stays nothing
  const int64_t classes;
  const bool pays;
  const float spacing;  // of the weights
  float* ratio;         // [classes, kLanes]
  Float bound;          // of the logits in each cell
  bool steady = false;
  int64_t next = 0;

  Progression(const Run& run, Arena& arena)
      : classes(classes_of(run.call)),
        pays(run.columns.phases > 2 && !selects(run.call) && !distills(run.call) && run.factors.focal == 0),
        spacing(spacing_of(run.call)), ratio(arena.take<float>(classes * kLanes)) {}

  static float spacing_of(const Bcl& call) {
    const Positions columns = positions_of(call.logits.width, call.target.width, call.options.align_corners);
    return static_cast<float>(columns.step) / static_cast<float>(columns.divisor);
  }

  void begin(const SourceRows& source) {
    Float reach = fill(0.0f);
    bound = load<Float>(source.left);
    for (int64_t c = 0; pays && c < classes; ++c) {
      const Float left = load<Float>(source.left + c * kLanes), step = load<Float>(source.step + c * kLanes);
      reach = larger(reach, larger(step, -step)), bound = larger(bound, larger(left, left + step));
      store(ratio + c * kLanes, exp(step * spacing), kLanes);
    }
    steady = pays && !any(reach > kLargest), next = 0;
  }

  // False where the pixels of a phase are to be evaluated for themselves.
  bool evaluate(Pixels& pixels, const Between& logits, int64_t phase) {
    if (!steady) return false;
    const bool follows = phase == next && phase % kSteps != 0;
    Float sum = fill(0.0f);
    for (int64_t c = 0; c < classes; ++c) {
      float* const at = pixels.exps + c * kLanes;
      const Float e = follows ? load<Float>(at) * load<Float>(ratio + c * kLanes) : exp(logits(c) - bound);
      store(at, e, kLanes);
      sum += e;
    }
    pixels.sum = sum, next = phase + 1;
    return true;
  }
};

// Calls each(y, weight of the source row below) for the output rows of a row of cells.
template <typename Each>
void each_output_row(const Bcl& call, int64_t row, Each each) {
  const int64_t in = call.logits.height, out = call.target.height;
  const bool aligned = call.options.align_corners;
  const int64_t end = first_output(row + 1, in, out, aligned);
  for (int64_t y = first_output(row, in, out, aligned); y < end; ++y)
    each(y, below(call, row) != row ? lerp_weight(y, row, in, out, aligned) : 0.0f);
}

// Gradient of the corners of a row of cells, [planes, pitch] each; the last plane is what smoothing spreads, see
// planes_of.
struct Corners {
  const Bcl& call;
  const float* spread;  // the weights of the classes
  const int64_t classes, planes, pitch;
  float *top_left, *top_right, *bottom_left, *bottom_right;
  float *sum, *right;  // [planes, kLanes]: of the row in hand, over the columns of a cell: all, and times weight_x
  bool touched = false;  // whether they hold anything

  Corners(const Run& run, Arena& arena)
      : call(run.call), spread(run.spread.of_class), classes(classes_of(call)), planes(planes_of(call)),
        pitch(run.columns.pitch) {
    for (float** piece : {&top_left, &top_right, &bottom_left, &bottom_right})
      *piece = arena.take<float>(planes * pitch);
    for (float** piece : {&sum, &right}) *piece = arena.take<float>(planes * kLanes);
  }

  void clear() {
    for (float* piece : {top_left, top_right, bottom_left, bottom_right})
      std::memset(piece, 0, planes * pitch * sizeof(float));
  }
  void touch() {
    if (touched) return;
    for (float* piece : {sum, right}) std::memset(piece, 0, planes * kLanes * sizeof(float));
    touched = true;
  }

  void add(int64_t plane, Float g, Float weight_x) {
    store(sum + plane * kLanes, load<Float>(sum + plane * kLanes) + g, kLanes);
    store(right + plane * kLanes, load<Float>(right + plane * kLanes) + weight_x * g, kLanes);
  }

  // Add pixels at the same place of kLanes cells to the row in hand. Of binary logits the first class is none.
  template <typename Gradient>
  void add_position(const Gradient& gradient, Float weight_x) {
    touch();
    for (int64_t c = classes - call.logits.channels; c < classes; ++c) add(c, gradient(c), weight_x);
  }

  void add_spread(Float amount, Float weight_x) {
    touch();
    add(classes, amount, weight_x);
  }

  void add_row(int64_t cell, float weight_y) {
    if (!touched) return;
    touched = false;
    for (int64_t c = 0; c < planes; ++c) {
      const Float b = load<Float>(right + c * kLanes), a = load<Float>(sum + c * kLanes) - b;
      const int64_t at = c * pitch + cell;
      store(top_left + at, load<Float>(top_left + at) + (1 - weight_y) * a, kLanes);
      store(top_right + at, load<Float>(top_right + at) + (1 - weight_y) * b, kLanes);
      store(bottom_left + at, load<Float>(bottom_left + at) + weight_y * a, kLanes);
      store(bottom_right + at, load<Float>(bottom_right + at) + weight_y * b, kLanes);
    }
  }

  // Add pixels anywhere in kLanes cells.
  template <typename Gradient>
  void add_pixels(const Gradient& gradient, int64_t cell, Float weight_x, Float weight_y) {
    for (int64_t c = 0; c < classes; ++c) {
      const Float g = gradient(c), b = weight_x * g, a = g - b;
      const Float lower_a = weight_y * a, lower_b = weight_y * b;
      const int64_t at = c * pitch + cell;
      store(top_left + at, load<Float>(top_left + at) + (a - lower_a), kLanes);
      store(top_right + at, load<Float>(top_right + at) + (b - lower_b), kLanes);
      store(bottom_left + at, load<Float>(bottom_left + at) + lower_a, kLanes);
      store(bottom_right + at, load<Float>(bottom_right + at) + lower_b, kLanes);
    }
  }

  // Source pixel j is the right border of cell j and the left one of cell j + 1.
  void write(const float* lefts, const float* rights, int64_t c, bool adds, float* to) const {
    const int64_t width = call.logits.width;
    const auto add = [&](int64_t plane, float factor) {
      const float *a = lefts + plane * pitch, *b = rights + plane * pitch;
      for (int64_t x = 0; x < width; ++x) to[x] += factor * (a[x + 1] + b[x]);
      to[0] += factor * a[0];
      to[width - 1] += factor * b[width];
    };
    if (!adds) std::memset(to, 0, width * sizeof(float));
    add(c, 1.0f);
    if (planes > classes) add(classes, -spread[c]);
  }

  // Write what a row of cells gives to the source rows around it, or add it to what is there.
  void write(int64_t image, int64_t row, bool adds, float* gradient, float* lower) const {
    const int64_t width = call.logits.width, height = call.logits.height, channels = call.logits.channels;
    for (int64_t channel = 0; channel < channels; ++channel) {
      const int64_t c = classes - channels + channel;
      write(top_left, top_right, c, adds, gradient + ((image * channels + channel) * height + row) * width);
      write(bottom_left, bottom_right, c, adds, lower + ((image * height + row) * channels + channel) * width);
    }
  }
};

// Output rows whose selected pixels are listed at a time: of a cell, 64 pixels or one row.
int64_t listed_rows(const Columns& columns) { return columns.phases < 64 ? 64 / columns.phases : 1; }

// The selected pixels of some output rows inside a row of cells, listed for each cell.
struct Selected {
  const Bcl& call;
  const Columns& columns;
  const Maps& maps;
  const bool flips;            // whether the flipped labels are targets too
  int32_t* count;              // [pitch]: pixels of a cell
  int32_t *own, *others;       // [listed, pitch]: Labels
  float *weight_x, *weight_y;  // [listed, pitch]: of the source pixels to the right and below
  float* weight;               // [listed, pitch]: of the pixel, where not all have 1

  Selected(const Run& run, Arena& arena)
      : call(run.call), columns(run.columns), maps(run.maps),
        flips(call.options.terms[1] != 0 || call.options.terms[2] != 0), count(arena.take<int32_t>(columns.pitch)) {
    const int64_t size = listed_rows(columns) * columns.positions();
    for (int32_t** piece : {&own, &others}) *piece = arena.take<int32_t>(size);
    for (float** piece : {&weight_x, &weight_y}) *piece = arena.take<float>(size);
    weight = arena.take<float>(call.pixel_weight.data ? size : 0);
  }

  void clear() { std::memset(count, 0, columns.pitch * sizeof(int32_t)); }

  void add_row(int64_t image, int64_t y, float below) {
    const BclOptions& options = call.options;
    const View& weights = call.pixel_weight;
    const float* given = weights.data ? static_cast<const float*>(weights.data) + offset_of(weights, image, 0, y) : nullptr;
    const int64_t width = call.target.width, height = call.target.height, row = image * height + y;
    const int64_t other = flipped(y, height, options.step[0], options.offset[0], options.mirror);
    const int16_t* labels = maps.labels + row * width;
    const int16_t* rows = labels + (other - y) * width;
    each_marked(maps.mask + row * width, width, [&](int64_t x) {
      const int64_t position = columns.position[x], cell = columns.cell[x];
      const int64_t at = count[cell]++ * columns.pitch + cell;
      own[at] = (labels[x] + 1) | 1 << Labels::kSelected;
      if (flips) others[at] = Labels::pack_others(labels[x] + 1, rows[x] + 1, labels[columns.flipped[x]] + 1);
      weight_x[at] = columns.weight[position], weight_y[at] = below;
      if (given) weight[at] = given[x * weights.column_stride];
    });
  }

  // Calls each(cell, labels, pixel weight, weight_x, weight_y) for one pixel of each of kLanes cells, as long as one has any left.
  template <typename Each>
  void each_vector(Each each) const {
    const Int none = fill(0);
    const Float zero = fill(0.0f);
    for (int64_t cell = 0; cell < columns.pitch; cell += kLanes) {
      const Int counts = load<Int>(count + cell);
      int64_t at = cell;
      for (int32_t i = 0; any(counts > i); ++i, at += columns.pitch) {
        const Int listed = counts > i, own_label = listed ? load<Int>(own + at) : none;
        const Labels labels{own_label, flips ? (listed ? load<Int>(others + at) : none) : none};
        const auto of_listed = [&](const float* numbers) { return listed ? load<Float>(numbers + at) : zero; };
        const Float pixel_weight = call.pixel_weight.data ? of_listed(weight) : fill(1.0f);
        each(cell, labels, pixel_weight, of_listed(weight_x), of_listed(weight_y));
      }
    }
  }
};

// Goes through all pixels: to score them, and where it `differentiates` for the gradient; or, where their scores are
// known, for the gradient alone, which is then complete.
template <bool kTerms, bool kScores, bool kDecides>
void walk(const Run& run, bool differentiates, float* gradient) {
  const Bcl& call = run.call;
  const Columns& columns = run.columns;
  const bool smooths = call.options.smoothing != 0;
  const View& of_teacher = distills(call) ? call.teacher : call.logits;
  Arena needed{nullptr};
  Line(run, needed), SourceRows(run, call.logits, needed), Corners(run, needed);
  if (kDecides) Corners(run, needed);
  if (kTerms) SourceRows(run, of_teacher, needed), Progression(run, needed);
  run.parallel_units(needed.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    Arena arena{static_cast<char*>(scratch)}, none{nullptr};
    Line line(run, arena);
    SourceRows source(run, call.logits, arena);
    Corners corners(run, arena), chosen(run, kDecides ? arena : none);
    SourceRows teacher(run, of_teacher, kTerms ? arena : none);
    Progression progression(run, kTerms ? arena : none);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / call.logits.height, row = unit % call.logits.height;
      RowStats& stats = run.by_unit[unit];
      source.read_pair(image, row);
      if (kTerms && distills(call)) teacher.read_pair(image, row);
      if (kTerms && kScores) line.begin_unit();
      if (gradient) corners.clear();
      if (run.chosen) chosen.clear();
      each_output_row(call, row, [&](int64_t y, float weight_y) {
        line.read_labels(image, y, !kScores && selects(call));
        for (int64_t cell = 0; cell < columns.pitch; cell += kLanes) {
          TermSums sums;
          source.interpolate(cell, fill(weight_y));
          if (kTerms && distills(call)) teacher.interpolate(cell, fill(weight_y));
          if (!kScores) progression.begin(source);
          for (int64_t at = cell; at < columns.positions(); at += columns.pitch) {
            if (!line.any_counts<kTerms>(at)) {  // such as in the half cells at the sides
              if (kScores) store(line.score + at, fill(0), kLanes);
              continue;
            }
            const Float weight_x = load<Float>(columns.weight + at);
            const Between logits = source.between(weight_x), others = teacher.between(weight_x);
            if (!kScores) {
              const bool known = progression.evaluate(line.pixels, logits, at / columns.pitch);
              if (!known) line.evaluate_again(logits, others, at, sums);
            } else if (kTerms || differentiates) {
              line.evaluate<true, kTerms, kDecides>(logits, others, at, unit, stats, sums);
            } else {
              line.evaluate<false, kTerms, kDecides>(logits, others, at, unit, stats, sums);
            }
            if (!differentiates) continue;
            if constexpr (kTerms) {
              TermGradient gradient = line.gradient(at, image);
              if (smooths) corners.add_spread(gradient.take_spread(), weight_x);
              gradient.use([&](const auto& g) { corners.add_position(g, weight_x); });
            } else {
              const Labels label = line.labels(at);
              const auto add_to = [&](Corners& to, Int which) {
                constexpr TermFactors factors{1, 0, 0, 0, 0};
                const Float counts = !kDecides || which != 0 ? fill(1.0f) : fill(0.0f);
                const Amounts<Float> amounts = amounts_of<false>(line.pixels, label, counts, {}, factors);
                to.add_position(Gradient(line.pixels, label, amounts), weight_x);
              };
              const Int rest = (label(0) >= 0) & ~line.chosen;
              if (kDecides && any(line.chosen)) add_to(chosen, line.chosen);
              if (!kDecides || (call.options.ce_weight != 0 && any(rest))) add_to(corners, rest);
            }
          }
          if (differentiates) corners.add_row(cell, weight_y), chosen.add_row(cell, weight_y);
          sums.add_to<kTerms, kDecides>(stats);
        }
        if (kScores) line.write_maps();
      });
      if (kTerms && kScores) line.end_unit(unit);
      if (gradient) corners.write(image, row, false, gradient, run.lower);
      if (run.chosen) chosen.write(image, row, false, run.chosen, run.chosen_lower);
    }
  });
}

template <bool kTerms>
void add_boundary(const Run& run, const TermFactors& factors, float* gradient) {
  const Bcl& call = run.call;
  Arena needed{nullptr};
  Selected(run, needed), SourceRows(run, call.logits, needed), Pixels(call, needed);
  Corners(run, needed);
  run.parallel_units(needed.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    Selected selected(run, arena);
    SourceRows source(run, call.logits, arena);
    Pixels pixels(call, arena);
    Corners corners(run, arena);
    selected.clear();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / call.logits.height, row = unit % call.logits.height;
      Float boundary;
      const auto evaluate = [&](int64_t cell, const Labels& labels, Float pixel_weight, Float weight_x, Float weight_y) {
        source.interpolate(cell, weight_y);
        pixels.evaluate<true>(source.between(weight_x));
        const Float weight = class_weights(call, labels(0)) * pixel_weight;
        const Float terms = boundary_term<kTerms>(pixels, labels, pixels.cross_entropy(labels(0)));
        boundary += weight != 0.0f ? weight * terms : fill(0.0f);
        if (!gradient) return;
        const Amounts<Float> amounts = amounts_of<kTerms>(pixels, labels, pixel_weight, {}, factors);
        corners.add_pixels(Gradient(pixels, labels, amounts), cell, weight_x, weight_y);
      };
      source.read_pair(image, row);
      if (gradient) corners.clear();
      const auto take_listed = [&] {
        boundary = fill(0.0f);
        selected.each_vector(evaluate);
        selected.clear();
        run.by_unit[unit].boundary += sum_of(boundary);
      };
      int64_t listed = 0;
      each_output_row(call, row, [&](int64_t y, float weight_y) {
        selected.add_row(image, y, weight_y);
        if (++listed % listed_rows(run.columns) == 0) take_listed();
      });
      take_listed();
      if (gradient) corners.write(image, row, true, gradient, run.lower);
    }
  });
}

}  // namespace

void score_upsampled(const Run& run, float* gradient) {
  const TermFactors& factors = run.factors;
  if (decides(run.call)) return walk<false, true, true>(run, gradient != nullptr, gradient);
  if (!has_terms(run.call)) return walk<false, true, false>(run, gradient && run.call.options.ce_weight != 0, gradient);
  const bool dense = factors.ce != 0 || factors.focal != 0 || factors.spread != 0 || factors.distillation != 0;
  walk<true, true, false>(run, gradient && dense, gradient);
}

void differentiate_upsampled(const Run& run, float* gradient) { walk<true, false, false>(run, true, gradient); }

void add_selected(const Run& run, float factor, float* gradient) {
  const TermFactors factors{0, factor, 0, 0, 0};
  if (has_terms(run.call)) {
    add_boundary<true>(run, factors, gradient);
  } else {
    add_boundary<false>(run, factors, gradient);
  }
}

// Makes `gradient` what it is to be: `factor` times the sum of what the cells above and below a source row add.
void add_lower(const Run& run, float factor, float of_chosen, float* gradient) {
  const int64_t channels = run.call.logits.channels, height = run.call.logits.height, width = run.call.logits.width;
  const bool constant = classes_of(run.call) == 1;
  parallel_tasks(run.parallel, run.units, channels * width, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / height, row = unit % height;
      const bool adds = row > 0 && below(run.call, row - 1) != row - 1;
      for (int64_t c = 0; c < channels; ++c) {
        float* to = gradient + ((image * channels + c) * height + row) * width;
        const int64_t at = (to - gradient), above = ((unit - 1) * channels + c) * width;
        for (int64_t x = 0; x < width; ++x) {
          float sum = to[x] + (adds ? run.lower[above + x] : 0.0f);
          if (run.chosen) sum += of_chosen * (run.chosen[at + x] + (adds ? run.chosen_lower[above + x] : 0.0f));
          to[x] = constant ? 0.0f : factor * sum;
        }
      }
    }
  });
}

}  // namespace bcmfnet::BCM_ISA
