// The binding of lmfm: takes tensors that bcmfnet/ops/lmfm.py has checked or made.
#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/scratch.h"
#include "common/tensor.h"
#include "lmfm/lmfm_cpu.h"
#include "lmfm/lmfm_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

Lmfm describe(
    const Tensor& x, const Tensor& norms, const Tensor& scale, const Tensor& process, const Tensor& compression,
    const std::optional<Tensor>& shortcut, const Integers& pools, const Integers& kernels, const Integers& receives,
    Tensor& out) {
  Lmfm call{};
  call.pyramid = make_pyramid(x.size(0), x.size(1), x.size(2), x.size(3), pools.data(), pools.size());
  call.dtype = dtype_of(x);
  call.x = x.const_data_ptr();
  call.batch_stride = x.stride(0), call.channel_stride = x.stride(1);
  call.row_stride = x.stride(2), call.column_stride = x.stride(3);
  call.branches = static_cast<int32_t>(kernels.size());
  std::copy(kernels.begin(), kernels.end(), call.kernel);
  std::copy(receives.begin(), receives.end(), call.receives);
  call.breadth = scale.size(2), call.outputs = compression.size(1);
  call.norms = static_cast<const float*>(norms.const_data_ptr()), call.norm_stride = norms.size(1);
  call.scale = scale.const_data_ptr();
  call.process = process.numel() > 0 ? process.const_data_ptr() : nullptr;
  call.compression = compression.const_data_ptr();
  call.shortcut = shortcut ? shortcut->const_data_ptr() : nullptr;
  call.out = out.mutable_data_ptr();
  call.out_batch_stride = out.stride(0), call.out_channel_stride = out.stride(1);
  call.out_row_stride = out.stride(2), call.out_column_stride = out.stride(3);
  return call;
}

void in_parallel(int64_t count, int64_t work, int64_t floats, Body body, const void* context) {
  const int64_t grain = 1 + kGrain / std::max<int64_t>(work, 1);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch = make_scratch(floats);
    body(context, begin, end, scratch.get());
  });
}

void on_cpu(
    const Tensor& x, const Tensor& norms, const Tensor& scale, const Tensor& process, const Tensor& compression,
    std::optional<Tensor> shortcut, Integers pools, Integers kernels, Integers receives, Tensor out) {
  const Lmfm call = describe(x, norms, scale, process, compression, shortcut, pools, kernels, receives, out);
  const Scratch scratch = make_scratch(BCM_CHOOSE(lmfm_scratch_bytes)(call) / sizeof(float));
  BCM_CHOOSE(lmfm_write)(call, scratch.get(), in_parallel);
}

#if BCMFNET_WITH_CUDA
void on_cuda(
    const Tensor& x, const Tensor& norms, const Tensor& scale, const Tensor& process, const Tensor& compression,
    std::optional<Tensor> shortcut, Integers pools, Integers kernels, Integers receives, Tensor out) {
  const Lmfm call = describe(x, norms, scale, process, compression, shortcut, pools, kernels, receives, out);
  const Tensor scratch = torch::stable::empty(
      {lmfm_scratch_bytes_cuda(&call)}, torch::headeronly::ScalarType::Byte, std::nullopt, x.device());
  launch(x, [&](void* stream) { return lmfm_cuda(&call, scratch.mutable_data_ptr(), stream); });
}
#endif

BCM_SCHEMA {
  m.def(
      "_lmfm(Tensor x, Tensor norms, Tensor scale, Tensor process, Tensor compression, Tensor? shortcut, int[] pools, "
      "int[] kernels, int[] receives, Tensor(a!) out) -> ()");
}
BCM_SERVE("_lmfm", on_cpu, on_cuda)

}  // namespace
}  // namespace bcmfnet
