// The binding of upsample_add_relu: takes tensors that bcmfnet/ops/_upsample_add_relu.py has checked or made.
#include "common/tensor.h"
#include "upsample_add_relu/upsample_add_relu_cpu.h"
#include "upsample_add_relu/upsample_add_relu_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;

void forward(const Tensor& high, const Tensor& low, Tensor out) {
  const UpsampleAddReLU call{view_of(low), view_of(high), output_view_of(out)};
  BCM_RUN(high, BCM_CHOOSE(upsample_add_relu_cpu)(call, run_tasks), upsample_add_relu_cuda(&call, stream));
}

void backward(const Tensor& grad, const Tensor& out, Tensor high, Tensor low) {
  const UpsampleAddReLUBackward call{view_of(grad), view_of(out), output_view_of(high), output_view_of(low)};
  BCM_RUN(
      grad, BCM_CHOOSE(upsample_add_relu_backward_cpu)(call, run_tasks),
      upsample_add_relu_backward_cuda(&call, stream));
}

BCM_SCHEMA {
  m.def("_upsample_add_relu(Tensor high, Tensor low, Tensor(a!) out) -> ()");
  m.def("_upsample_add_relu_backward(Tensor grad, Tensor out, Tensor(a!) high, Tensor(b!) low) -> ()");
}
BCM_SERVE("_upsample_add_relu", forward)
BCM_SERVE("_upsample_add_relu_backward", backward)

}  // namespace
}  // namespace bcmfnet
