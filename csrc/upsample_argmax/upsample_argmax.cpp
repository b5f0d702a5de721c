// The binding of upsample_argmax: takes tensors that bcmfnet/ops/_upsample_argmax.py has checked.
#include <optional>

#include "common/tensor.h"
#include "upsample_argmax/upsample_argmax_cpu.h"
#include "upsample_argmax/upsample_argmax_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;

void run(const Tensor& logits, Tensor labels, std::optional<Tensor> confidence) {
  const UpsampleArgmax call{
      view_of(logits), labels.size(1), labels.size(2), labels.mutable_data_ptr(),
      confidence ? data_of<uint16_t>(*confidence) : nullptr, dtype_of(labels) == DType::kInt16};
  BCM_RUN(logits, BCM_CHOOSE(upsample_argmax_cpu)(call, run_tasks), upsample_argmax_cuda(&call, stream));
}

BCM_SCHEMA { m.def("_upsample_argmax(Tensor logits, Tensor(a!) labels, Tensor(b!)? confidence) -> ()"); }
BCM_SERVE("_upsample_argmax", run)

}  // namespace
}  // namespace bcmfnet
