// The loss on a CPU: its memory, its labels, and the order of the stages that its rooms have.
#include "bcl/bcl_cpu.h"

#include <type_traits>

#include "bcl/bcl_math.h"
#include "bcl/rooms_cpu.h"
#include "common/arena.h"
#include "common/bilinear.h"

namespace bcmfnet::BCM_ISA {
namespace {

// First output column of cell k: cell 0 is left of the first source column, cell in_width right of the last one.
int64_t first_column(const Bcl& call, int64_t k) {
  const int64_t in = call.logits.width, out = call.target.width;
  if (k <= 0) return 0;
  if (k > in) return out;
  const Positions positions = positions_of(in, out, call.options.align_corners);
  const int64_t step = larger_of(positions.step, int64_t{1});  // 0 where all outputs lie on the one source column
  return (positions.divisor * (k - 1) - positions.first + step - 1) / step;
}

Columns take_columns(const Bcl& call, Arena& arena) {
  const int64_t width = call.target.width;
  Columns columns{round_up(is_upsampled(call) ? call.logits.width + 1 : width, kLanes), 1, {}, {}, {}, {}, {}};
  for (int64_t k = 0; is_upsampled(call) && k <= call.logits.width; ++k)
    columns.phases = larger_of(columns.phases, first_column(call, k + 1) - first_column(call, k));
  columns.column = arena.take<int32_t>(columns.positions()), columns.weight = arena.take<float>(columns.positions());
  for (int32_t** piece : {&columns.position, &columns.cell, &columns.flipped}) *piece = arena.take<int32_t>(width);
  return columns;
}

void fill_columns(const Bcl& call, const Columns& columns) {
  const BclOptions& options = call.options;
  const int64_t in = call.logits.width, out = call.target.width, cells = is_upsampled(call) ? in + 1 : out;
  for (int64_t i = 0; i < columns.positions(); ++i)
    columns.column[i] = static_cast<int32_t>(out), columns.weight[i] = 0;
  for (int64_t k = 0; k < cells; ++k) {
    const int64_t begin = is_upsampled(call) ? first_column(call, k) : k;
    const int64_t end = is_upsampled(call) ? first_column(call, k + 1) : k + 1;
    for (int64_t x = begin; x < end; ++x) {
      const int64_t at = (x - begin) * columns.pitch + k;
      columns.column[at] = static_cast<int32_t>(x), columns.position[x] = static_cast<int32_t>(at);
      columns.cell[x] = static_cast<int32_t>(k);
      columns.flipped[x] = static_cast<int32_t>(flipped(x, out, options.step[1], options.offset[1], options.mirror));
      if (is_upsampled(call) && k > 0) columns.weight[at] = lerp_weight(x, k - 1, in, out, options.align_corners);
    }
  }
}

// What a forward and a backward need.
Run take_run(const Bcl& call, Arena& arena, Parallel parallel) {
  const int64_t rows = call.target.batch * call.target.height, units = call.logits.batch * call.logits.height;
  Run run{call, parallel, rows, units, take_columns(call, arena), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  run.spread.of_class = arena.take<float>(classes_of(call));
  run.maps.labels = arena.take<int16_t>(rows * call.target.width);
  run.by_row = arena.take<RowStats>(rows);
  return run;
}

// What only a forward needs, besides.
void take_forward(Run& run, bool saves, Arena& arena) {
  const int64_t pixels = run.rows * run.call.target.width, groups = run.thresholds_count();
  const bool up = is_upsampled(run.call);
  run.by_unit = arena.take<RowStats>(run.units), run.thresholds = arena.take<int32_t>(groups);
  if (has_overlap(run.call.options)) {
    run.overlap_sums = arena.take<double>(run.units * 3 * classes_of(run.call));
    run.own_slopes = arena.take<float>(overlap_groups(run.call) * 2 * classes_of(run.call));
  }
  const int64_t gradients = up && saves ? run.units * run.call.logits.channels * run.call.logits.width : 0;
  if (gradients > 0) run.lower = arena.take<float>(gradients);
  if (gradients > 0 && decides(run.call))
    run.chosen = arena.take<float>(gradients), run.chosen_lower = arena.take<float>(gradients);
  const bool ranked = by_rank(run.call.options.selection);
  if (!selects(run.call) || (decides(run.call) && !ranked)) return;
  if (ranked) run.histogram = arena.take<uint32_t>(groups * kScores);
  run.maps.score = arena.take<uint16_t>(pixels);
  if (!up) run.maps.term = arena.take<float>(pixels);
  if (up || !saves) run.maps.mask = arena.take<uint8_t>(pixels);
}

// A pixel of weight 0 has no label.
template <bool kWeights, typename T>
RowStats read_labels(const Bcl& call, const T* from, const float* weights, int16_t* to) {
  using Wide = std::conditional_t<sizeof(T) < sizeof(int64_t), int32_t, int64_t>;
  const int64_t width = call.target.width, stride = call.pixel_weight.column_stride;
  const Wide classes = static_cast<Wide>(classes_of(call)), ignored = static_cast<Wide>(call.options.ignore_index);
  const bool ignores = ignored == call.options.ignore_index;  // else no label of this type is ignored
  const auto weight_of = [&](int64_t x) { return kWeights ? weights[x * stride] : 1.0f; };
  int32_t count = 0, wrong = 0;
  const auto read = [&](int64_t step) __attribute__((always_inline)) {
    for (int64_t x = 0; x < width; ++x) {
      const Wide label = from[x * step];
      const bool valid = !(ignores & (label == ignored)) & (weight_of(x) != 0);
      const bool known = (label >= 0) & (label < classes);
      to[x] = valid & known ? static_cast<int16_t>(label) : int16_t{-1};
      count += valid, wrong |= valid & !known;
    }
  };
  if (call.target.column_stride == 1) {
    read(1);  // in vectors
  } else {
    read(call.target.column_stride);
  }
  RowStats row{};
  row.valid = count, row.wrong_label = wrong;
  for (int64_t x = 0; (kWeights || call.class_weight) && x < width; ++x) {
    const float weight = weight_of(x);
    if (call.class_weight && to[x] >= 0) row.weight += weight * call.class_weight[to[x]];
    row.all += weight, row.plain += to[x] >= 0 ? weight : 0.0f;
  }
  if (!kWeights) row.all = static_cast<double>(width), row.plain = static_cast<double>(row.valid);
  if (!call.class_weight) row.weight = row.plain;
  return row;
}

template <typename T>
RowStats read_labels(const Bcl& call, const void* data, int64_t at, const float* weights, int16_t* to) {
  const T* from = static_cast<const T*>(data) + at;
  return weights ? read_labels<true>(call, from, weights, to) : read_labels<false>(call, from, weights, to);
}

RowStats read_labels(const Bcl& call, int64_t image, int64_t y, int16_t* to) {
  const View& target = call.target;
  const int64_t at = offset_of(target, image, 0, y);
  const float* given = static_cast<const float*>(call.pixel_weight.data);
  const float* weights = given ? given + offset_of(call.pixel_weight, image, 0, y) : nullptr;
  switch (target.dtype) {
    case DType::kUInt8: return read_labels<uint8_t>(call, target.data, at, weights, to);
    case DType::kInt16: return read_labels<int16_t>(call, target.data, at, weights, to);
    case DType::kInt32: return read_labels<int32_t>(call, target.data, at, weights, to);
    default: return read_labels<int64_t>(call, target.data, at, weights, to);
  }
}

// False where a label is neither a class nor ignore_index.
bool read_labels(const Run& run) {
  const int64_t height = run.call.target.height, width = run.call.target.width;
  run.parallel_rows(0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t row = begin; row < end; ++row)
      run.by_row[row] = read_labels(run.call, row / height, row % height, run.maps.labels + row * width);
  });
  for (int64_t row = 0; row < run.rows; ++row)
    if (run.by_row[row].wrong_label) return false;
  return true;
}

// Sums of labels and weights, of all rows.
RowStats sum_of_rows(const Run& run) {
  RowStats sum{};
  for (int64_t i = 0; i < run.rows; ++i) {
    const RowStats& row = run.by_row[i];
    sum.weight += row.weight, sum.plain += row.plain, sum.all += row.all, sum.boundary += row.boundary;
    sum.valid += row.valid, sum.selected += row.selected;
  }
  return sum;
}

// The weights of binary logits' two classes are in the divisor of none.
Divisors divisors_of(const Run& run, const RowStats& sum) {
  const BclOptions& options = run.call.options;
  const double weight = options.binary ? sum.plain : sum.weight, distilled = options.everywhere ? sum.all : sum.plain;
  return bcmfnet::divisors_of(options, std::isfinite(sum.weight), weight, sum.valid, sum.selected, distilled);
}

// The slopes that the gradient takes: those that are given, or those of the sums; and the values of the terms.
void set_slopes(Run& run, const BclOutputs& outputs, double* values) {
  const int64_t count = overlap_groups(run.call) * 2 * classes_of(run.call);
  float* const to = outputs.slopes ? outputs.slopes : run.own_slopes;
  evaluate_overlap(run, values, outputs.sums, to);
  if (run.call.shared_slopes) std::memcpy(to, run.call.shared_slopes, count * sizeof(float));
  run.slopes = to;
}

// Binary logits have the class weights 1 and pos_weight, kept in `weights`.
Bcl weighted(const Bcl& call, float (&weights)[2]) {
  Bcl result = call;
  weights[0] = 1, weights[1] = call.options.pos_weight;
  if (call.options.binary && call.options.pos_weight != 1) result.class_weight = weights;
  return result;
}

void fill_spread(Run& run) {
  for (int64_t c = 0; c < classes_of(run.call); ++c) {
    const float weight = run.call.class_weight ? run.call.class_weight[c] : 1.0f;
    run.spread.of_class[c] = weight;
    run.spread.sum += weight;
  }
}

}  // namespace

int64_t bcl_forward_bytes_cpu(const Bcl& call, bool saves) {
  Arena arena{nullptr};
  Run run = take_run(call, arena, nullptr);
  take_forward(run, saves, arena);
  return arena.bytes;
}

int64_t bcl_backward_bytes_cpu(const Bcl& call) {
  Arena arena{nullptr};
  take_run(call, arena, nullptr);
  return arena.bytes;
}

bool bcl_forward_cpu(const Bcl& given, const BclOutputs& outputs, bool saves, void* scratch, Parallel parallel) {
  float of_binary[2];
  const Bcl call = weighted(given, of_binary);
  const BclOptions& options = call.options;
  const bool up = is_upsampled(call), terms = has_terms(call), overlaps = has_overlap(options);
  const int64_t classes = classes_of(call);
  Arena arena{static_cast<char*>(scratch)};
  Run run = take_run(call, arena, parallel);
  take_forward(run, saves, arena);
  if (saves && !up) run.maps.mask = outputs.mask, run.maps.lse = outputs.lse;
  std::memset(run.by_unit, 0, run.units * sizeof(RowStats));
  if (overlaps) std::memset(run.overlap_sums, 0, run.units * 3 * classes * sizeof(double));
  fill_columns(call, run.columns);
  fill_spread(run);
  if (!read_labels(run)) return false;
  RowStats sum = sum_of_rows(run);
  run.factors = term_factors_of(options, classes, divisors_of(run, sum).inverse, sum.weight > 0);
  if (up) {
    score_upsampled(run, overlaps ? nullptr : outputs.gradient);
  } else {
    score_full(run);
  }
  const bool known = decides(call) && chosen_are_enough(run);
  if (selects(call) && !known) {
    find_candidates(run);
    select(run);
  } else {
    for (int64_t i = 0; i < run.thresholds_count(); ++i) run.thresholds[i] = options.selection.tau;
    if (run.maps.mask) std::memset(run.maps.mask, 0, run.rows * call.target.width);
  }

  sum = sum_of_rows(run);
  for (int64_t i = 0; known && i < run.units; ++i) sum.selected += run.by_unit[i].selected;
  const bool usable = std::isfinite(sum.weight);
  const Divisors divisors = divisors_of(run, sum);
  double means[kValues] = {};
  run.factors = term_factors_of(options, classes, divisors.inverse, sum.weight > 0);
  if (overlaps) set_slopes(run, outputs, means + kDice);
  const float scale = terms ? (usable ? 1.0f : __builtin_nanf("")) : divisors.scale;
  if (up && overlaps && outputs.gradient) {
    differentiate_upsampled(run, outputs.gradient);
  } else if (up && selects(call) && !known) {
    add_selected(run, terms ? run.factors.boundary : divisors.boundary_factor, outputs.gradient);
  }
  const float of_ce = options.ce_weight != 0 ? 1.0f : 0.0f;
  if (outputs.gradient)
    add_lower(run, scale, of_ce + divisors.boundary_factor * options.terms[0], outputs.gradient);
  for (int64_t i = 0; i < run.units; ++i) {
    const RowStats& unit = run.by_unit[i];
    sum.ce += unit.ce, sum.boundary += unit.boundary, sum.focal += unit.focal;
    sum.spread += unit.spread, sum.distillation += unit.distillation, sum.nan |= unit.nan;
  }
  const double* inverse = divisors.inverse;
  means[kCe] = sum.ce * inverse[0];
  if (options.smoothing != 0) {
    const double share = sum.weight > 0 ? options.smoothing / static_cast<double>(classes) : 0;
    means[kCe] = (1 - options.smoothing) * means[kCe] + share * (sum.spread * inverse[0]);
  }
  means[kBoundary] = sum.nan ? __builtin_nan("") : sum.boundary * inverse[1];
  means[kFocal] = sum.focal * inverse[0], means[kDistillation] = sum.distillation * inverse[2];
  *outputs.loss = static_cast<float>(usable ? loss_of(options, means) : __builtin_nan(""));
  for (int i = 0; i < kValues; ++i) outputs.values[i] = static_cast<float>(means[i]);
  outputs.counts[0] = sum.selected, outputs.counts[1] = sum.valid;
  for (int64_t i = 0; i < run.thresholds_count(); ++i) outputs.threshold[i] = run.thresholds[i];
  for (int i = 0; outputs.scales && i < 3; ++i) outputs.scales[i] = static_cast<float>(inverse[i]);
  return true;
}

void bcl_backward_cpu(
    const Bcl& given, const BclSaved& saved, const View& gradient, void* scratch, Parallel parallel) {
  float of_binary[2];
  const Bcl call = weighted(given, of_binary);
  Arena arena{static_cast<char*>(scratch)};
  Run run = take_run(call, arena, parallel);
  fill_columns(call, run.columns);
  fill_spread(run);
  read_labels(run);
  run.maps.lse = const_cast<float*>(saved.lse), run.maps.mask = const_cast<uint8_t*>(saved.mask);
  run.slopes = saved.slopes;
  run.factors = term_factors_of(call.options, classes_of(call), saved.scales, sum_of_rows(run).weight > 0);
  write_gradient(run, *saved.grad, gradient);
}

}  // namespace bcmfnet::BCM_ISA
