// The binding of upsample_argmax: takes tensors that bcmfnet/ops/upsample_argmax.py has checked.
#include <optional>

#include "common/tensor.h"
#include "upsample_argmax/upsample_argmax_cpu.h"
#include "upsample_argmax/upsample_argmax_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;

UpsampleArgmax describe(const Tensor& logits, Tensor& labels, std::optional<Tensor>& confidence) {
  return {view_of(logits), labels.size(1), labels.size(2), labels.mutable_data_ptr(),
          confidence ? data_of<uint16_t>(*confidence) : nullptr, dtype_of(labels) == DType::kInt16};
}

void on_cpu(const Tensor& logits, Tensor labels, std::optional<Tensor> confidence) {
  BCM_CHOOSE(upsample_argmax_cpu)(describe(logits, labels, confidence), run_tasks);
}

#if BCMFNET_WITH_CUDA
void on_cuda(const Tensor& logits, Tensor labels, std::optional<Tensor> confidence) {
  const UpsampleArgmax call = describe(logits, labels, confidence);
  launch(logits, [&](void* stream) { return upsample_argmax_cuda(&call, stream); });
}
#endif

BCM_SCHEMA { m.def("_upsample_argmax(Tensor logits, Tensor(a!) labels, Tensor(b!)? confidence) -> ()"); }
BCM_SERVE("_upsample_argmax", on_cpu, on_cuda)

}  // namespace
}  // namespace bcmfnet
