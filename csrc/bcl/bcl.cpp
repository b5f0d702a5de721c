// The binding of the loss: takes tensors that bcmfnet/ops/_bcl.py has checked or made.
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

// In the order of `pack` in bcmfnet/ops/_loss_options.py.
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
  options.focal_boundary = integers[12];
  const auto real = [&](int i) { return static_cast<float>(reals[i]); };
  options.smoothing = real(9), options.focal_weight = real(10), options.gamma = real(11);
  options.overlap = {{real(12), real(13), real(14)}, real(15), real(16), real(17),
                     static_cast<Overlap::Absent>(integers[14]), integers[13] != 0, integers[15] != 0};
  options.distillation_weight = real(18), options.temperature = real(19), options.everywhere = integers[16];
  options.binary = integers[17], options.pos_weight = real(20), options.align_corners = integers[18];
  return options;
}

// A map [batch, H, W] as one of one channel.
View view_of_map(const Tensor& map) {
  return {const_cast<void*>(map.const_data_ptr()), map.size(0), 1, map.size(1), map.size(2),
          map.stride(0), 0, map.stride(1), map.stride(2), dtype_of(map)};
}

const float* floats_if_any(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

Bcl describe(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& pixel_weight, const std::optional<Tensor>& teacher, const Reals& reals,
    const Integers& integers) {
  return {view_of(logits), view_of_map(target), floats_if_any(weight),
          pixel_weight ? view_of_map(*pixel_weight) : View{}, teacher ? view_of(*teacher) : View{}, nullptr,
          unpack(reals, integers)};
}

template <typename T>
T* data_if_any(const std::optional<Tensor>& tensor) {
  return tensor ? data_of<T>(*tensor) : nullptr;
}

// Whether every label is a class or ignore_index; if not, nothing is written. On a GPU a wrong label makes the loss
// NaN: to tell the host, it would have to wait.
bool forward(
    const Tensor& logits, const Tensor& target, std::optional<Tensor> weight, std::optional<Tensor> pixel_weight,
    std::optional<Tensor> teacher, std::optional<Tensor> shared_slopes, Reals reals, Integers integers, bool saves,
    Tensor loss, Tensor values, Tensor counts, Tensor threshold, std::optional<Tensor> sums, std::optional<Tensor> lse,
    std::optional<Tensor> mask, std::optional<Tensor> scales, std::optional<Tensor> slopes,
    std::optional<Tensor> gradient) {
  Bcl call = describe(logits, target, weight, pixel_weight, teacher, reals, integers);
  call.shared_slopes = floats_if_any(shared_slopes);
  const BclOutputs outputs{
      data_of<float>(loss), data_of<float>(values), data_of<int64_t>(counts), data_of<int32_t>(threshold),
      data_if_any<float>(sums), data_if_any<float>(lse), data_if_any<uint8_t>(mask), data_if_any<float>(scales),
      data_if_any<float>(slopes), data_if_any<float>(gradient)};
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
    const Tensor& grad, const Tensor& logits, const Tensor& target, std::optional<Tensor> weight,
    std::optional<Tensor> pixel_weight, std::optional<Tensor> teacher, Reals reals, Integers integers,
    const Tensor& lse, const Tensor& mask, const Tensor& scales, std::optional<Tensor> slopes, Tensor gradient) {
  const Bcl call = describe(logits, target, weight, pixel_weight, teacher, reals, integers);
  const View result = output_view_of(gradient);
  const auto floats = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const BclSaved saved{
      floats(grad), floats(lse), static_cast<const uint8_t*>(mask.const_data_ptr()), floats(scales),
      floats_if_any(slopes)};
  BCM_RUN(
      logits,
      BCM_CHOOSE(bcl_backward_cpu)(
          call, saved, result,
          make_scratch(BCM_CHOOSE(bcl_backward_bytes_cpu)(call)).get(), run_tasks),
      bcl_backward_cuda(&call, &saved, &result, stream));
}

BCM_SCHEMA {
  m.def(
      "_bcl_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, Tensor? teacher, "
      "Tensor? shared_slopes, float[] reals, int[] integers, bool saves, "
      "Tensor(a!) loss, Tensor(b!) values, Tensor(c!) counts, Tensor(d!) threshold, Tensor(e!)? sums, "
      "Tensor(f!)? lse, Tensor(g!)? mask, Tensor(h!)? scales, Tensor(i!)? slopes, Tensor(j!)? gradient) -> bool");
  m.def(
      "_bcl_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, "
      "Tensor? teacher, float[] reals, int[] integers, Tensor lse, Tensor mask, Tensor scales, Tensor? slopes, "
      "Tensor(a!) gradient) -> ()");
}
BCM_SERVE("_bcl_forward", forward)
BCM_SERVE("_bcl_backward", backward)

}  // namespace
}  // namespace bcmfnet
