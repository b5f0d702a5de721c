// The binding of upsample_add_relu: takes tensors that bcmfnet/ops/upsample_add_relu.py has checked or made.
#include "common/tensor.h"
#include "upsample_add_relu/upsample_add_relu_cpu.h"
#include "upsample_add_relu/upsample_add_relu_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;

UpsampleAddReLU describe(const Tensor& high, const Tensor& low, Tensor& out) {
  return {view_of(low), view_of(high), output_view_of(out)};
}

void on_cpu(const Tensor& high, const Tensor& low, Tensor out) {
  BCM_CHOOSE(upsample_add_relu_cpu)(describe(high, low, out), run_tasks);
}

#if BCMFNET_WITH_CUDA
void on_cuda(const Tensor& high, const Tensor& low, Tensor out) {
  const UpsampleAddReLU call = describe(high, low, out);
  launch(high, [&](void* stream) { return upsample_add_relu_cuda(&call, stream); });
}
#endif

BCM_SCHEMA { m.def("_upsample_add_relu(Tensor high, Tensor low, Tensor(a!) out) -> ()"); }
BCM_SERVE("_upsample_add_relu", on_cpu, on_cuda)

}  // namespace
}  // namespace bcmfnet
