// The binding of lmfm: takes tensors that bcmfnet/ops/_lmfm.py has checked or made.
#include <optional>
#include <vector>

#include "common/tensor.h"
#include "lmfm/lmfm_cpu.h"
#include "lmfm/lmfm_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

int32_t level_of(const Integers& kernels, const Integers& receives, int64_t branch) {
  if (kernels[branch] == 0) return 0;
  return receives[branch] < 0 ? 1 : 1 + level_of(kernels, receives, receives[branch]);
}

Lmfm describe(
    const Tensor& x, const Tensor& norms, const Tensor& scale, const Tensor& process, const Tensor& compression,
    const std::optional<Tensor>& shortcut, const Integers& pools, const Integers& kernels, const Integers& receives,
    Tensor& out) {
  Lmfm call{};
  call.x = view_of(x), call.out = output_view_of(out);
  call.pyramid = make_pyramid(call.x, pools.data(), pools.size());
  call.branches = static_cast<int32_t>(kernels.size()), call.branch_channels = scale.size(2);
  int32_t convolutions = 0, taps = 0;
  for (int32_t i = 0; i < call.branches; ++i) {
    const int32_t kernel = static_cast<int32_t>(kernels[i]);
    call.fusing[i] = {kernel, static_cast<int32_t>(receives[i]), level_of(kernels, receives, i), convolutions, taps};
    convolutions += kernel > 0, taps += kernel * kernel;
  }
  call.norm_stride = norms.size(1);
  call.scale_norm = static_cast<const float*>(norms.const_data_ptr());
  call.process_norm = call.scale_norm + call.branches * call.x.channels;
  call.compression_norm = call.process_norm + convolutions * call.branch_channels;
  call.shortcut_norm = call.compression_norm + call.branches * call.branch_channels;
  call.scale = scale.const_data_ptr();
  call.process = convolutions > 0 ? process.const_data_ptr() : nullptr;
  call.compression = compression.const_data_ptr();
  call.shortcut = shortcut ? shortcut->const_data_ptr() : nullptr;
  return call;
}

void run(
    const Tensor& x, const Tensor& norms, const Tensor& scale, const Tensor& process, const Tensor& compression,
    std::optional<Tensor> shortcut, Integers pools, Integers kernels, Integers receives, Tensor out) {
  const Lmfm call = describe(x, norms, scale, process, compression, shortcut, pools, kernels, receives, out);
  BCM_RUN(
      x, BCM_CHOOSE(lmfm_cpu)(call, make_scratch(BCM_CHOOSE(lmfm_scratch_bytes_cpu)(call)).get(), run_tasks),
      lmfm_cuda(&call, make_cuda_scratch(lmfm_scratch_bytes_cuda(&call), x).mutable_data_ptr(), stream));
}

BCM_SCHEMA {
  m.def(
      "_lmfm(Tensor x, Tensor norms, Tensor scale, Tensor process, Tensor compression, Tensor? shortcut, int[] pools, "
      "int[] kernels, int[] receives, Tensor(a!) out) -> ()");
}
BCM_SERVE("_lmfm", run)

}  // namespace
}  // namespace bcmfnet
