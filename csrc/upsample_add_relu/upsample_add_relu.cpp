// The binding of upsample_add_relu: takes tensors that bcmfnet/ops/upsample_add_relu.py has checked or made.
#include <torch/csrc/stable/ops.h>

#include "common/scratch.h"
#include "common/tensor.h"
#include "upsample_add_relu/upsample_add_relu_cpu.h"
#include "upsample_add_relu/upsample_add_relu_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;

Map map_of(const Tensor& map) {
  return {map.size(2), map.size(3), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

UpsampleAddReLU describe(const Tensor& high, const Tensor& low, Tensor& out) {
  UpsampleAddReLU call{};
  call.dtype = dtype_of(high);
  call.batch = high.size(0), call.channels = high.size(1);
  call.low = map_of(low), call.high = map_of(high), call.out = map_of(out);
  call.low_values = low.const_data_ptr(), call.high_values = high.const_data_ptr();
  call.out_values = out.mutable_data_ptr();
  return call;
}

void on_cpu(const Tensor& high, const Tensor& low, Tensor out) {
  const UpsampleAddReLU call = describe(high, low, out);
  const int64_t tasks = BCM_CHOOSE(upsample_add_relu_tasks)(call);
  const int64_t floats = BCM_CHOOSE(upsample_add_relu_scratch)(call), work = out.numel() / tasks;
  const auto write = BCM_CHOOSE(upsample_add_relu_rows);
  torch::stable::parallel_for(0, tasks, 1 + kGrain / work, [&](int64_t begin, int64_t end) {
    const Scratch scratch = make_scratch(floats);
    write(call, begin, end, scratch.get());
  });
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
