// The binding of the Boundary Corrected Loss: takes tensors that bcmfnet/ops/bcl.py has checked, and runs the stages.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "bcl/bcl_cpu.h"
#include "bcl/bcl_cuda.h"
#include "bcl/bcl_math.h"
#include "common/bilinear.h"
#include "common/select.h"
#include "common/tensor.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;
using Reals = std::vector<double>;
using Integers = std::vector<int64_t>;

// In the order of `_packed` in bcmfnet/ops/bcl.py.
BclOptions unpack(const Reals& reals, const Integers& integers) {
  BclOptions options{};
  for (int i = 0; i < 3; ++i) options.score[i] = static_cast<float>(reals[i]);
  for (int i = 0; i < 3; ++i) options.terms[i] = static_cast<float>(reals[3 + i]);
  options.ce_weight = static_cast<float>(reals[6]), options.boundary_weight = static_cast<float>(reals[7]);
  options.ignore_index = integers[0];
  for (int i = 0; i < 2; ++i) options.step[i] = integers[1 + i], options.offset[i] = integers[3 + i];
  options.nms = integers[5];
  options.selection = {reals[8], integers[6], integers[7], static_cast<int32_t>(integers[8])};
  options.mirror = integers[9], options.by_valid = integers[10], options.per_image = integers[11];
  return options;
}

Bcl describe(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight, const BclOptions& options) {
  Bcl call{};
  call.logits = logits.const_data_ptr(), call.logits_type = dtype_of(logits);
  call.target = target.const_data_ptr(), call.target_type = dtype_of(target);
  call.weight = weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr;
  call.batch = logits.size(0), call.classes = logits.size(1);
  call.in_height = logits.size(2), call.in_width = logits.size(3);
  call.out_height = target.size(1), call.out_width = target.size(2);
  for (int i = 0; i < 4; ++i) call.logits_stride[i] = logits.stride(i);
  for (int i = 0; i < 3; ++i) call.target_stride[i] = target.stride(i);
  call.options = options;
  return call;
}

// Memory without the cost of clearing it.
template <typename T>
std::unique_ptr<T[]> fresh(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// The order of a row's columns, see BclColumns, and its memory.
struct Columns {
  std::vector<int32_t> column, position, cell, flip;
  std::vector<float> share;
  BclColumns view;

  explicit Columns(const Bcl& call) : position(call.out_width), cell(call.out_width), flip(call.out_width) {
    const int64_t cells = upsamples(call) ? call.in_width + 1 : call.out_width;
    view.pitch = (cells + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
    view.phases = 1;
    if (upsamples(call))
      for (int64_t k = 0; k < cells; ++k) view.phases = std::max(view.phases, first(call, k + 1) - first(call, k));
    column.assign(view.positions(), static_cast<int32_t>(call.out_width));
    share.assign(view.positions(), 0.0f);
    for (int64_t k = 0; k < cells; ++k) {
      const int64_t begin = upsamples(call) ? first(call, k) : k, end = upsamples(call) ? first(call, k + 1) : k + 1;
      for (int64_t x = begin; x < end; ++x) {
        const int64_t at = (x - begin) * view.pitch + k;
        column[at] = static_cast<int32_t>(x), position[x] = static_cast<int32_t>(at), cell[x] = static_cast<int32_t>(k);
        if (upsamples(call) && k > 0) share[at] = share_of(x, k - 1, call.in_width, call.out_width);
      }
    }
    const BclOptions& options = call.options;
    for (int64_t x = 0; x < call.out_width; ++x)
      flip[x] = static_cast<int32_t>(flipped(x, call.out_width, options.step[1], options.offset[1], options.mirror));
    view.column = column.data(), view.share = share.data();
    view.position = position.data(), view.cell = cell.data(), view.flipped = flip.data();
  }

  // First output column of cell k: cell 0 is left of the first source column, cell in_width right of the last one.
  static int64_t first(const Bcl& call, int64_t k) {
    if (k <= 0) return 0;
    if (k > call.in_width) return call.out_width;
    const int64_t numerator = 2 * call.out_width * (k - 1) + call.out_width - call.in_width;
    return (numerator + 2 * call.in_width - 1) / (2 * call.in_width);
  }
};

template <typename Body>
void in_parallel(int64_t count, int64_t work, Body body) {
  torch::stable::parallel_for(0, count, 1 + kGrain / std::max<int64_t>(work, 1), body);
}

// One forward on a CPU: its maps and the partial figures of its rows.
struct Forward {
  const Bcl& call;
  const Columns columns;
  const int64_t rows, pixels;
  std::unique_ptr<int16_t[]> labels;
  std::unique_ptr<uint16_t[]> score;
  std::unique_ptr<float[]> term, lower;
  std::unique_ptr<uint8_t[]> own_mask;
  BclMaps maps{};
  std::vector<BclRow> by_row, by_unit;
  std::vector<int32_t> thresholds;

  explicit Forward(const Bcl& call)
      : call(call), columns(call), rows(call.batch * call.out_height), pixels(rows * call.out_width),
        labels(fresh<int16_t>(pixels)), by_row(rows), by_unit(units(call)),
        thresholds(call.options.per_image ? call.batch : 1, call.options.selection.tau) {
    maps.labels = labels.get();
  }

  int64_t row_work() const { return call.out_width; }
  int64_t unit_work() const { return call.classes * call.out_width * call.out_height / call.in_height; }

  bool read_labels() {
    in_parallel(rows, row_work(), [&](int64_t begin, int64_t end) {
      BCM_CHOOSE(bcl_labels)(call, maps, begin, end, by_row.data());
    });
    for (const BclRow& row : by_row)
      if (row.wrong_label) return false;
    return true;
  }

  // body(begin, end, scratch) of units of work.
  template <typename Body>
  void by_units(Body body) const {
    in_parallel(units(call), unit_work(), [&](int64_t begin, int64_t end) {
      body(begin, end, fresh<int32_t>(scratch_words(call, columns.view)).get());
    });
  }

  void evaluate() {
    by_units([&](int64_t begin, int64_t end, void* scratch) {
      BCM_CHOOSE(bcl_scores)(call, columns.view, maps, begin, end, by_unit.data(), scratch);
    });
  }

  // With upsampling; the gradient may be null.
  void evaluate_low(float* gradient) {
    if (gradient) lower = fresh<float>(units(call) * call.classes * call.in_width);
    by_units([&](int64_t begin, int64_t end, void* scratch) {
      BCM_CHOOSE(bcl_low_scores)
      (call, columns.view, maps, gradient, lower.get(), begin, end, by_unit.data(), scratch);
    });
  }

  void select() {
    std::vector<uint32_t> histogram(thresholds.size() * kScores);
    std::mutex adding;
    in_parallel(rows, row_work(), [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> own(histogram.size());
      const auto scratch = fresh<uint16_t>(4 * call.out_width);
      BCM_CHOOSE(bcl_candidates)(call, maps, begin, end, own.data(), scratch.get());
      const std::lock_guard<std::mutex> lock(adding);
      for (size_t i = 0; i < own.size(); ++i) histogram[i] += own[i];
    });
    for (size_t i = 0; i < thresholds.size(); ++i)
      thresholds[i] = select_threshold(histogram.data() + i * kScores, call.options.selection);
    in_parallel(rows, row_work(), [&](int64_t begin, int64_t end) {
      BCM_CHOOSE(bcl_select)(call, maps, thresholds.data(), begin, end, by_row.data());
    });
  }

  void evaluate_selected(float factor, float* gradient) {
    by_units([&](int64_t begin, int64_t end, void* scratch) {
      BCM_CHOOSE(bcl_low_selected)
      (call, columns.view, maps, factor, gradient, lower.get(), begin, end, by_unit.data(), scratch);
    });
  }

  void add_lower(float factor, float* gradient) const {
    in_parallel(units(call), call.classes * call.in_width, [&](int64_t begin, int64_t end) {
      BCM_CHOOSE(bcl_add_lower)(call, factor, lower.get(), gradient, begin, end);
    });
  }
};

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Whether every label is a class or ignore_index; if not, nothing is written.
bool forward_on_cpu(
    const Tensor& logits, const Tensor& target, std::optional<Tensor> weight, Reals reals, Integers integers,
    bool saves, Tensor loss, Tensor ce, Tensor boundary, Tensor selected, Tensor valid, Tensor threshold, Tensor lse,
    Tensor mask, Tensor scales, Tensor gradient) {
  const BclOptions options = unpack(reals, integers);
  const Bcl call = describe(logits, target, weight, options);
  Forward forward(call);
  if (!forward.read_labels()) return false;
  const bool in_full = !upsamples(call), selects = options.boundary_weight != 0;
  float* const low_gradient = saves && !in_full ? data<float>(gradient) : nullptr;
  if (!(saves && in_full) && selects) forward.own_mask = fresh<uint8_t>(forward.pixels);
  forward.maps.mask = saves && in_full ? data<uint8_t>(mask) : forward.own_mask.get();
  if (saves && in_full) forward.maps.lse = data<float>(lse);
  if (selects) forward.score = fresh<uint16_t>(forward.pixels);
  if (selects && in_full) forward.term = fresh<float>(forward.pixels);
  forward.maps.score = forward.score.get(), forward.maps.term = forward.term.get();
  if (in_full) {
    forward.evaluate();
  } else {
    forward.evaluate_low(low_gradient);
  }
  if (selects) forward.select();
  if (!selects && saves && in_full) std::memset(forward.maps.mask, 0, forward.pixels);

  BclRow sum{};
  for (const BclRow& row : forward.by_row) {
    sum.weight += row.weight, sum.boundary += row.boundary;
    sum.valid += row.valid, sum.selected += row.selected;
  }
  const double divisor = static_cast<double>(options.by_valid ? sum.valid : sum.selected);
  double inverse[2] = {sum.weight > 0 ? 1 / sum.weight : 1, divisor > 0 ? 1 / divisor : 1};
  const bool usable = std::isfinite(sum.weight);
  if (!usable) inverse[0] = inverse[1] = std::numeric_limits<double>::quiet_NaN();  // nobody shall train on
  const double of_ce = options.ce_weight * inverse[0], of_hard = options.boundary_weight * inverse[1];
  const double scale = options.ce_weight != 0 ? of_ce : of_hard;  // of what the gradient was accumulated in
  if (selects && !in_full) forward.evaluate_selected(static_cast<float>(of_hard / scale), low_gradient);
  if (low_gradient) forward.add_lower(static_cast<float>(scale), low_gradient);
  for (const BclRow& unit : forward.by_unit) {
    sum.ce += unit.ce, sum.boundary += unit.boundary;
    sum.nan |= unit.nan;
  }
  const double mean = sum.ce * inverse[0];
  const double hard = sum.nan ? std::numeric_limits<double>::quiet_NaN() : sum.boundary * inverse[1];
  const double total = (options.ce_weight != 0 ? options.ce_weight * mean : 0) +
                       (selects ? options.boundary_weight * hard : 0);
  *data<float>(loss) = usable ? static_cast<float>(total) : std::numeric_limits<float>::quiet_NaN();
  *data<float>(ce) = static_cast<float>(mean), *data<float>(boundary) = static_cast<float>(hard);
  *data<int64_t>(selected) = sum.selected, *data<int64_t>(valid) = sum.valid;
  for (size_t i = 0; i < forward.thresholds.size(); ++i) data<int32_t>(threshold)[i] = forward.thresholds[i];
  if (saves && in_full) {
    const float factors[2] = {static_cast<float>(inverse[0]), static_cast<float>(inverse[1])};
    std::memcpy(data<float>(scales), factors, sizeof(factors));
  }
  return true;
}

void backward_on_cpu(
    const Tensor& grad, const Tensor& logits, const Tensor& target, std::optional<Tensor> weight, Reals reals,
    Integers integers, const Tensor& lse, const Tensor& mask, const Tensor& scales, Tensor gradient) {
  const Bcl call = describe(logits, target, weight, unpack(reals, integers));
  Forward forward(call);
  forward.read_labels();
  forward.maps.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  forward.maps.mask = const_cast<uint8_t*>(static_cast<const uint8_t*>(mask.const_data_ptr()));
  const float factor = *static_cast<const float*>(grad.const_data_ptr());
  int64_t stride[4];
  for (int i = 0; i < 4; ++i) stride[i] = gradient.stride(i);
  forward.by_units([&](int64_t begin, int64_t end, void* scratch) {
    BCM_CHOOSE(bcl_gradient)
    (call, forward.columns.view, forward.maps, static_cast<const float*>(scales.const_data_ptr()), factor,
     gradient.mutable_data_ptr(), stride, begin, end, scratch);
  });
}

#if BCMFNET_WITH_CUDA

// Memory of a tensor, null where it is empty.
template <typename T>
T* data_if_any(const Tensor& tensor) {
  return tensor.numel() > 0 ? data<T>(tensor) : nullptr;
}

// A wrong label makes the loss NaN: to tell the host, it would have to wait.
bool forward_on_cuda(
    const Tensor& logits, const Tensor& target, std::optional<Tensor> weight, Reals reals, Integers integers,
    bool saves, Tensor loss, Tensor ce, Tensor boundary, Tensor selected, Tensor valid, Tensor threshold, Tensor lse,
    Tensor mask, Tensor scales, Tensor gradient) {
  const Bcl call = describe(logits, target, weight, unpack(reals, integers));
  const BclOutputs outputs{
      data<float>(loss), data<float>(ce), data<float>(boundary), data<int64_t>(selected), data<int64_t>(valid),
      data<int32_t>(threshold), data_if_any<float>(lse), data_if_any<uint8_t>(mask), data_if_any<float>(scales),
      data_if_any<float>(gradient)};
  const int64_t bytes = bcl_scratch_bytes_cuda(&call, saves);
  const Tensor scratch =
      torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte, std::nullopt, logits.device());
  launch(logits, [&](void* stream) {
    return bcl_forward_cuda(&call, &outputs, scratch.mutable_data_ptr(), saves, stream);
  });
  return true;
}

void backward_on_cuda(
    const Tensor& grad, const Tensor& logits, const Tensor& target, std::optional<Tensor> weight, Reals reals,
    Integers integers, const Tensor& lse, const Tensor& mask, const Tensor& scales, Tensor gradient) {
  const Bcl call = describe(logits, target, weight, unpack(reals, integers));
  int64_t stride[4];
  for (int i = 0; i < 4; ++i) stride[i] = gradient.stride(i);
  launch(logits, [&](void* stream) {
    return bcl_backward_cuda(
        &call, static_cast<const float*>(grad.const_data_ptr()), static_cast<const float*>(lse.const_data_ptr()),
        static_cast<const uint8_t*>(mask.const_data_ptr()), static_cast<const float*>(scales.const_data_ptr()),
        gradient.mutable_data_ptr(), stride, stream);
  });
}

#endif

BCM_SCHEMA {
  m.def(
      "_bcl_forward(Tensor logits, Tensor target, Tensor? weight, float[] reals, int[] integers, bool saves, "
      "Tensor(a!) loss, Tensor(b!) ce, Tensor(c!) boundary, Tensor(d!) selected, Tensor(e!) valid, "
      "Tensor(f!) threshold, Tensor(g!) lse, Tensor(h!) mask, Tensor(i!) scales, Tensor(j!) gradient) -> bool");
  m.def(
      "_bcl_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, float[] reals, int[] integers, "
      "Tensor lse, Tensor mask, Tensor scales, Tensor(a!) gradient) -> ()");
}
BCM_SERVE("_bcl_forward", forward_on_cpu, forward_on_cuda)
BCM_SERVE("_bcl_backward", backward_on_cpu, backward_on_cuda)

}  // namespace
}  // namespace bcmfnet
