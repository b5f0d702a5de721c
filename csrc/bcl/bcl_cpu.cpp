// The loss on a CPU: its memory, its labels, and the order of the stages that its rooms have.
#include "bcl/bcl_cpu.h"

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
  return (2 * out * (k - 1) + out - in + 2 * in - 1) / (2 * in);
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
      if (is_upsampled(call) && k > 0) columns.weight[at] = lerp_weight(x, k - 1, in, out);
    }
  }
}

// What a forward and a backward need.
Run take_run(const Bcl& call, Arena& arena, Parallel parallel) {
  const int64_t rows = call.target.batch * call.target.height, units = call.logits.batch * call.logits.height;
  Run run{call, parallel, rows, units, take_columns(call, arena), {}, {}, {}, {}, {}, {}};
  run.maps.labels = arena.take<int16_t>(rows * call.target.width);
  run.by_row = arena.take<RowStats>(rows);
  return run;
}

// What only a forward needs, besides.
void take_forward(Run& run, bool saves, Arena& arena) {
  const int64_t pixels = run.rows * run.call.target.width, groups = run.thresholds_count();
  const bool up = is_upsampled(run.call);
  run.by_unit = arena.take<RowStats>(run.units), run.thresholds = arena.take<int32_t>(groups);
  if (up && saves) run.lower = arena.take<float>(run.units * run.call.logits.channels * run.call.logits.width);
  if (!selects(run.call)) return;
  run.histogram = arena.take<uint32_t>(groups * kScores), run.maps.score = arena.take<uint16_t>(pixels);
  if (!up) run.maps.term = arena.take<float>(pixels);
  if (up || !saves) run.maps.mask = arena.take<uint8_t>(pixels);
}

template <typename T>
RowStats read_labels(const Bcl& call, const T* from, int16_t* to) {
  RowStats row{};
  for (int64_t x = 0; x < call.target.width; ++x) {
    const int64_t label = from[x * call.target.column_stride];
    const bool valid = label != call.options.ignore_index, known = label >= 0 && label < call.logits.channels;
    to[x] = valid && known ? static_cast<int16_t>(label) : -1;
    row.valid += valid;
    row.wrong_label |= valid && !known;
    if (call.class_weight && valid && known) row.weight += call.class_weight[label];
  }
  if (!call.class_weight) row.weight = static_cast<double>(row.valid);
  return row;
}

RowStats read_labels(const Bcl& call, int64_t image, int64_t y, int16_t* to) {
  const View& target = call.target;
  const int64_t at = offset_of(target, image, 0, y);
  switch (target.dtype) {
    case DType::kUInt8: return read_labels(call, static_cast<const uint8_t*>(target.data) + at, to);
    case DType::kInt16: return read_labels(call, static_cast<const int16_t*>(target.data) + at, to);
    case DType::kInt32: return read_labels(call, static_cast<const int32_t*>(target.data) + at, to);
    default: return read_labels(call, static_cast<const int64_t*>(target.data) + at, to);
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

bool bcl_forward_cpu(const Bcl& call, const BclOutputs& outputs, bool saves, void* scratch, Parallel parallel) {
  const BclOptions& options = call.options;
  const bool up = is_upsampled(call);
  Arena arena{static_cast<char*>(scratch)};
  Run run = take_run(call, arena, parallel);
  take_forward(run, saves, arena);
  if (saves && !up) run.maps.mask = outputs.mask, run.maps.lse = outputs.lse;
  std::memset(run.by_unit, 0, run.units * sizeof(RowStats));
  fill_columns(call, run.columns);
  if (!read_labels(run)) return false;
  if (up) {
    score_upsampled(run, outputs.gradient);
  } else {
    score_full(run);
  }
  if (selects(call)) {
    find_candidates(run);
    select(run);
  } else {
    for (int64_t i = 0; i < run.thresholds_count(); ++i) run.thresholds[i] = options.selection.tau;
    if (run.maps.mask) std::memset(run.maps.mask, 0, run.rows * call.target.width);
  }

  RowStats sum{};
  for (int64_t i = 0; i < run.rows; ++i) {
    const RowStats& row = run.by_row[i];
    sum.weight += row.weight, sum.boundary += row.boundary;
    sum.valid += row.valid, sum.selected += row.selected;
  }
  const bool usable = std::isfinite(sum.weight);
  const Divisors divisors = divisors_of(options, usable, sum.weight, sum.valid, sum.selected);
  if (selects(call) && up) add_selected(run, divisors.boundary_factor, outputs.gradient);
  if (outputs.gradient) add_lower(run, divisors.scale, outputs.gradient);
  for (int64_t i = 0; i < run.units; ++i) {
    const RowStats& unit = run.by_unit[i];
    sum.ce += unit.ce, sum.boundary += unit.boundary;
    sum.nan |= unit.nan;
  }
  const double ce = sum.ce * divisors.inverse[0];
  const double boundary = sum.nan ? __builtin_nan("") : sum.boundary * divisors.inverse[1];
  *outputs.loss = static_cast<float>(usable ? loss_of(options, ce, boundary) : __builtin_nan(""));
  for (int i = 0; i < kValues; ++i) outputs.values[i] = 0;
  outputs.values[kCe] = static_cast<float>(ce), outputs.values[kBoundary] = static_cast<float>(boundary);
  outputs.counts[0] = sum.selected, outputs.counts[1] = sum.valid;
  for (int64_t i = 0; i < run.thresholds_count(); ++i) outputs.threshold[i] = run.thresholds[i];
  for (int i = 0; outputs.scales && i < 2; ++i) outputs.scales[i] = static_cast<float>(divisors.inverse[i]);
  if (outputs.scales) outputs.scales[2] = 0;
  return true;
}

void bcl_backward_cpu(
    const Bcl& call, const BclSaved& saved, const View& gradient, void* scratch, Parallel parallel) {
  Arena arena{static_cast<char*>(scratch)};
  Run run = take_run(call, arena, parallel);
  fill_columns(call, run.columns);
  read_labels(run);
  run.maps.lse = const_cast<float*>(saved.lse), run.maps.mask = const_cast<uint8_t*>(saved.mask);
  write_gradient(run, saved.scales, *saved.grad, gradient);
}

}  // namespace bcmfnet::BCM_ISA
