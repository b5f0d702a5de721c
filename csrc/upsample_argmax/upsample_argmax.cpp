// The binding of upsample_argmax: takes tensors that bcmfnet/ops/upsample_argmax.py has checked.
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "common/bilinear.h"
#include "common/tensor.h"
#include "upsample_argmax/upsample_argmax_cpu.h"
#include "upsample_argmax/upsample_argmax_cuda.h"

namespace bcmfnet {
namespace {

using torch::stable::Tensor;

UpsampleArgmax describe(const Tensor& logits, Tensor& labels, std::optional<Tensor>& confidence) {
  UpsampleArgmax call{};
  call.logits = logits.const_data_ptr();
  call.dtype = dtype_of(logits);
  call.wide = labels.scalar_type() == torch::headeronly::ScalarType::Short;
  call.batch = logits.size(0), call.classes = logits.size(1);
  call.in_height = logits.size(2), call.in_width = logits.size(3);
  call.batch_stride = logits.stride(0), call.class_stride = logits.stride(1);
  call.row_stride = logits.stride(2), call.column_stride = logits.stride(3);
  call.out_height = labels.size(1), call.out_width = labels.size(2);
  call.labels = labels.mutable_data_ptr();
  call.confidence = confidence ? static_cast<uint16_t*>(confidence->mutable_data_ptr()) : nullptr;
  return call;
}

void on_cpu(const Tensor& logits, Tensor labels, std::optional<Tensor> confidence) {
  const UpsampleArgmax call = describe(logits, labels, confidence);
  std::vector<int32_t> low(call.out_width + kMaxLanes);
  std::vector<float> share(low.size());
  for (int64_t x = 0; x < static_cast<int64_t>(low.size()); ++x) {
    const Source source = source_of(x < call.out_width ? x : call.out_width - 1, call.in_width, call.out_width);
    low[x] = static_cast<int32_t>(source.low);
    share[x] = source.share;
  }
  const Columns columns{low.data(), share.data()};
  const auto write = BCM_CHOOSE(upsample_argmax_cells);
  const int64_t work = call.classes * call.out_width * call.out_height / call.in_height;  // of a row of cells
  torch::stable::parallel_for(0, call.batch * call.in_height, 1 + kGrain / work, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> scratch(scratch_words(call));
    write(call, columns, begin, end, scratch.data());
  });
}

#if BCMFNET_WITH_CUDA
void on_cuda(const Tensor& logits, Tensor labels, std::optional<Tensor> confidence) {
  const UpsampleArgmax call = describe(logits, labels, confidence);
  launch(logits, [&](void* stream) { return upsample_argmax_cuda(&call, stream); });
}
#endif

BCM_SCHEMA { m.def("_upsample_argmax(Tensor logits, Tensor(a!) labels, Tensor(b!)? confidence) -> ()"); }
BCM_SERVE("_upsample_argmax", on_cpu, on_cuda)

}  // namespace
}  // namespace bcmfnet
