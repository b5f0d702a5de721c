// The binding of pyramid_pool: takes tensors that bcmfnet/ops/_pyramid_pool.py has checked or made.
#include <vector>

#include "common/tensor.h"
#include "pyramid_pool/pyramid_pool_cpu.h"
#include "pyramid_pool/pyramid_pool_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

void forward(const Tensor& x, Integers pools, bool channels_last, Tensor packed) {
  const View map = view_of(x);
  const PyramidPool call{
      make_pyramid(map, pools.data(), pools.size()), map, packed.mutable_data_ptr(), channels_last};
  BCM_RUN(x, BCM_CHOOSE(pyramid_pool_cpu)(call, run_tasks), pyramid_pool_cuda(&call, stream));
}

void backward(const Tensor& grad, Integers pools, bool channels_last, Tensor result) {
  const View map = output_view_of(result);
  const PyramidPool call{
      make_pyramid(map, pools.data(), pools.size()), map, const_cast<void*>(grad.const_data_ptr()), channels_last};
  BCM_RUN(grad, BCM_CHOOSE(pyramid_pool_backward_cpu)(call, run_tasks), pyramid_pool_backward_cuda(&call, stream));
}

BCM_SCHEMA {
  m.def("_pyramid_pool(Tensor x, int[] pools, bool channels_last, Tensor(a!) packed) -> ()");
  m.def("_pyramid_pool_backward(Tensor grad, int[] pools, bool channels_last, Tensor(a!) result) -> ()");
}
BCM_SERVE("_pyramid_pool", forward)
BCM_SERVE("_pyramid_pool_backward", backward)

}  // namespace
}  // namespace bcmfnet
