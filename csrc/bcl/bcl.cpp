// The binding of the Boundary Corrected Loss: takes tensors that bcmfnet/ops/_bcl.py has checked or made.
#include <optional>
#include <vector>

#include "bcl/bcl_cpu.h"
#include "bcl/bcl_cuda.h"
#include "common/tensor.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;
using Reals = std::vector<double>;
using Integers = std::vector<int64_t>;

// In the order of `_pack` in bcmfnet/ops/_bcl.py.
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
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight, const Reals& reals,
    const Integers& integers) {
  const View labels{const_cast<void*>(target.const_data_ptr()), target.size(0), 1, target.size(1), target.size(2),
                    target.stride(0), 0, target.stride(1), target.stride(2), dtype_of(target)};
  const float* class_weight = weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr;
  return {view_of(logits), labels, class_weight, unpack(reals, integers)};
}

template <typename T>
T* data_if_any(const Tensor& tensor) {
  return tensor.numel() > 0 ? data_of<T>(tensor) : nullptr;
}

// Whether every label is a class or ignore_index; if not, nothing is written. On a GPU a wrong label makes the loss
// NaN: to tell the host, it would have to wait.
bool forward(
    const Tensor& logits, const Tensor& target, std::optional<Tensor> weight, Reals reals, Integers integers,
    bool saves, Tensor loss, Tensor ce, Tensor boundary, Tensor selected, Tensor valid, Tensor threshold, Tensor lse,
    Tensor mask, Tensor scales, Tensor gradient) {
  const Bcl call = describe(logits, target, weight, reals, integers);
  const BclOutputs outputs{
      data_of<float>(loss), data_of<float>(ce), data_of<float>(boundary), data_of<int64_t>(selected),
      data_of<int64_t>(valid), data_of<int32_t>(threshold), data_if_any<float>(lse), data_if_any<uint8_t>(mask),
      data_if_any<float>(scales), data_if_any<float>(gradient)};
  bool known = true;
  BCM_RUN(
      logits,
      known = BCM_CHOOSE(bcl_forward_cpu)(
          call, outputs, saves, make_scratch(BCM_CHOOSE(bcl_forward_bytes_cpu)(call, saves)).get(), run_tasks),
      bcl_forward_cuda(
          &call, &outputs, make_cuda_scratch(bcl_scratch_bytes_cuda(&call, saves), logits).mutable_data_ptr(), saves,
          stream));
  return known;
}

void backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target, std::optional<Tensor> weight, Reals reals,
    Integers integers, const Tensor& lse, const Tensor& mask, const Tensor& scales, Tensor gradient) {
  const Bcl call = describe(logits, target, weight, reals, integers);
  const View result = output_view_of(gradient);
  const auto* factor = static_cast<const float*>(grad.const_data_ptr());
  const auto* log_sums = static_cast<const float*>(lse.const_data_ptr());
  const auto* selected = static_cast<const uint8_t*>(mask.const_data_ptr());
  const auto* inverse = static_cast<const float*>(scales.const_data_ptr());
  BCM_RUN(
      logits,
      BCM_CHOOSE(bcl_backward_cpu)(
          call, *factor, log_sums, selected, inverse, result,
          make_scratch(BCM_CHOOSE(bcl_backward_bytes_cpu)(call)).get(), run_tasks),
      bcl_backward_cuda(&call, factor, log_sums, selected, inverse, &result, stream));
}

BCM_SCHEMA {
  m.def(
      "_bcl_forward(Tensor logits, Tensor target, Tensor? weight, float[] reals, int[] integers, bool saves, "
      "Tensor(a!) loss, Tensor(b!) ce, Tensor(c!) boundary, Tensor(d!) selected, Tensor(e!) valid, "
      "Tensor(f!) threshold, Tensor(g!) lse, Tensor(h!) mask, Tensor(i!) scales, Tensor(j!) gradient) -> bool");
  m.def(
      "_bcl_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, float[] reals, int[] integers, "
      "Tensor lse, Tensor mask, Tensor scales, Tensor(a!) gradient) -> ()");
}
BCM_SERVE("_bcl_forward", forward)
BCM_SERVE("_bcl_backward", backward)

}  // namespace
}  // namespace bcmfnet
