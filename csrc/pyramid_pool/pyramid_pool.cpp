// The binding of pyramid_pool: takes tensors that bcmfnet/ops/pyramid_pool.py has checked or made.
#include <vector>

#include "common/tensor.h"
#include "pyramid_pool/pyramid_pool_cpu.h"
#include "pyramid_pool/pyramid_pool_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

PyramidPool describe_forward(const Tensor& x, const Integers& pools, bool channels_last, Tensor& packed) {
  const View map = view_of(x);
  return {make_pyramid(map, pools.data(), pools.size()), map, packed.mutable_data_ptr(), channels_last};
}

PyramidPool describe_backward(const Tensor& grad, const Integers& pools, bool channels_last, Tensor& result) {
  const View map = output_view_of(result);
  return {make_pyramid(map, pools.data(), pools.size()), map, const_cast<void*>(grad.const_data_ptr()), channels_last};
}

void forward_on_cpu(const Tensor& x, Integers pools, bool channels_last, Tensor packed) {
  BCM_CHOOSE(pyramid_pool_cpu)(describe_forward(x, pools, channels_last, packed), run_tasks);
}

void backward_on_cpu(const Tensor& grad, Integers pools, bool channels_last, Tensor result) {
  BCM_CHOOSE(pyramid_pool_backward_cpu)(describe_backward(grad, pools, channels_last, result), run_tasks);
}

#if BCMFNET_WITH_CUDA
void forward_on_cuda(const Tensor& x, Integers pools, bool channels_last, Tensor packed) {
  const PyramidPool call = describe_forward(x, pools, channels_last, packed);
  launch(x, [&](void* stream) { return pyramid_pool_cuda(&call, stream); });
}

void backward_on_cuda(const Tensor& grad, Integers pools, bool channels_last, Tensor result) {
  const PyramidPool call = describe_backward(grad, pools, channels_last, result);
  launch(grad, [&](void* stream) { return pyramid_pool_backward_cuda(&call, stream); });
}
#endif

BCM_SCHEMA {
  m.def("_pyramid_pool(Tensor x, int[] pools, bool channels_last, Tensor(a!) packed) -> ()");
  m.def("_pyramid_pool_backward(Tensor grad, int[] pools, bool channels_last, Tensor(a!) result) -> ()");
}
BCM_SERVE("_pyramid_pool", forward_on_cpu, forward_on_cuda)
BCM_SERVE("_pyramid_pool_backward", backward_on_cpu, backward_on_cuda)

}  // namespace
}  // namespace bcmfnet
