// The binding of pyramid_pool: takes tensors that bcmfnet/ops/pyramid_pool.py has checked or made.
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/scratch.h"
#include "common/tensor.h"
#include "pyramid_pool/pyramid_pool_cpu.h"
#include "pyramid_pool/pyramid_pool_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

PyramidPool describe(const Tensor& map, const Integers& pools, bool channels_last, void* values, void* packed) {
  PyramidPool call{};
  call.pyramid = make_pyramid(map.size(0), map.size(1), map.size(2), map.size(3), pools.data(), pools.size());
  call.dtype = dtype_of(map);
  call.channels_last = channels_last;
  call.map = values;
  call.batch_stride = map.stride(0), call.channel_stride = map.stride(1);
  call.row_stride = map.stride(2), call.column_stride = map.stride(3);
  call.packed = packed;
  return call;
}

PyramidPool forward_call(const Tensor& x, const Integers& pools, bool channels_last, Tensor& packed) {
  return describe(x, pools, channels_last, const_cast<void*>(x.const_data_ptr()), packed.mutable_data_ptr());
}

PyramidPool backward_call(const Tensor& grad, const Integers& pools, bool channels_last, Tensor& result) {
  return describe(result, pools, channels_last, result.mutable_data_ptr(), const_cast<void*>(grad.const_data_ptr()));
}

using Kernel = void (*)(const PyramidPool& call, int64_t begin, int64_t end, float* scratch);

void in_blocks(const PyramidPool& call, Kernel kernel) {
  const int64_t tasks = BCM_CHOOSE(pyramid_pool_tasks)(call), floats = BCM_CHOOSE(pyramid_pool_scratch)(call);
  const Pyramid& map = call.pyramid;
  const int64_t work = map.batch * map.channels * map.height * map.width / tasks;
  torch::stable::parallel_for(0, tasks, 1 + kGrain / (1 + work), [&](int64_t begin, int64_t end) {
    const Scratch scratch = make_scratch(floats);
    kernel(call, begin, end, scratch.get());
  });
}

void forward_on_cpu(const Tensor& x, Integers pools, bool channels_last, Tensor packed) {
  in_blocks(forward_call(x, pools, channels_last, packed), BCM_CHOOSE(pyramid_pool_blocks));
}

void backward_on_cpu(const Tensor& grad, Integers pools, bool channels_last, Tensor result) {
  in_blocks(backward_call(grad, pools, channels_last, result), BCM_CHOOSE(pyramid_pool_backward_blocks));
}

#if BCMFNET_WITH_CUDA
void forward_on_cuda(const Tensor& x, Integers pools, bool channels_last, Tensor packed) {
  const PyramidPool call = forward_call(x, pools, channels_last, packed);
  launch(x, [&](void* stream) { return pyramid_pool_cuda(&call, stream); });
}

void backward_on_cuda(const Tensor& grad, Integers pools, bool channels_last, Tensor result) {
  const PyramidPool call = backward_call(grad, pools, channels_last, result);
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
