// The binding of stem_conv: takes tensors that bcmfnet/ops/_stem_conv.py has checked or made.
#include <algorithm>
#include <vector>

#include "common/tensor.h"
#include "stem_conv/stem_conv_cpu.h"
#include "stem_conv/stem_conv_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;
using Reals = std::vector<double>;

void run(const Tensor& images, const Tensor& weight, const Tensor& bias, Reals scale, Reals shift, Tensor out) {
  StemConv call{view_of(images), view_of(weight), output_view_of(out), bias.const_data_ptr(), {}, {}};
  std::copy_n(scale.begin(), 3, call.scale);
  std::copy_n(shift.begin(), 3, call.shift);
  BCM_RUN(images, BCM_CHOOSE(stem_conv_cpu)(call, run_tasks), stem_conv_cuda(&call, stream));
}

BCM_SCHEMA {
  m.def(
      "_stem_conv(Tensor images, Tensor weight, Tensor bias, float[] scale, float[] shift, Tensor(a!) out) -> ()");
}
BCM_SERVE("_stem_conv", run)

}  // namespace
}  // namespace bcmfnet
