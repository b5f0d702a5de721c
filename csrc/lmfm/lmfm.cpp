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

Norms norms_of(const Tensor& norms) {
  const auto* const multipliers = static_cast<const float*>(norms.const_data_ptr());
  return {multipliers, multipliers + norms.size(1) * norms.size(2)};
}

Lmfm describe(
    const Tensor& x, const Tensor& scale_norms, const Tensor& fusion_norms, const Tensor& scale, const Tensor& process,
    const Tensor& compression, const std::optional<Tensor>& shortcut, const Integers& pools, const Integers& kernels,
    const Integers& receives, const Integers& levels, Tensor& out) {
  Lmfm call{};
  call.x = view_of(x), call.out = output_view_of(out);
  call.pyramid = make_pyramid(call.x, pools.data(), pools.size());
  call.branches = static_cast<int32_t>(kernels.size()), call.branch_channels = scale.size(2);
  int32_t convolutions = 0, taps = 0;
  for (int32_t i = 0; i < call.branches; ++i) {
    const auto kernel = static_cast<int32_t>(kernels[i]), level = static_cast<int32_t>(levels[i]);
    call.fusing[i] = {kernel, static_cast<int32_t>(receives[i]), level, convolutions, taps};
    convolutions += kernel > 0, taps += kernel * kernel;
  }
  call.scale_norms = norms_of(scale_norms), call.process_norms = norms_of(fusion_norms);
  call.shortcut_norms = call.scale_norms.from(call.branches * call.x.channels);
  call.compression_norms = call.process_norms.from(convolutions * call.branch_channels);
  call.scale = scale.const_data_ptr();
  call.process = convolutions > 0 ? process.const_data_ptr() : nullptr;
  call.compression = compression.const_data_ptr();
  call.shortcut = shortcut ? shortcut->const_data_ptr() : nullptr;
  return call;
}

void run(
    const Tensor& x, const Tensor& scale_norms, const Tensor& fusion_norms, const Tensor& scale, const Tensor& process,
    const Tensor& compression, std::optional<Tensor> shortcut, Integers pools, Integers kernels, Integers receives,
    Integers levels, Tensor out) {
  const Lmfm call = describe(
      x, scale_norms, fusion_norms, scale, process, compression, shortcut, pools, kernels, receives, levels, out);
  BCM_RUN(
      x, BCM_CHOOSE(lmfm_cpu)(call, make_scratch(BCM_CHOOSE(lmfm_scratch_bytes_cpu)(call)).get(), run_tasks),
      lmfm_cuda(&call, make_cuda_scratch(lmfm_scratch_bytes_cuda(&call), x).mutable_data_ptr(), stream));
}

BCM_SCHEMA {
  m.def(
      "_lmfm(Tensor x, Tensor scale_norms, Tensor fusion_norms, Tensor scale, Tensor process, Tensor compression, "
      "Tensor? shortcut, int[] pools, int[] kernels, int[] receives, int[] levels, Tensor(a!) out) -> ()");
}
BCM_SERVE("_lmfm", run)

}  // namespace
}  // namespace bcmfnet
