#include "common/tensor.h"

#include <algorithm>
#include <optional>

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

namespace bcmfnet {

DType dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Byte: return DType::kUInt8;
    case ScalarType::Short: return DType::kInt16;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    default: throw std::runtime_error("a tensor of a type that no kernel takes");
  }
}

View view_of(const torch::stable::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3),
          tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3), dtype_of(tensor)};
}

View output_view_of(torch::stable::Tensor& tensor) {
  View view = view_of(tensor);
  view.data = tensor.mutable_data_ptr();
  return view;
}

void run_tasks(int64_t tasks, int64_t work, int64_t bytes, RunRange run, const void* body) {
  constexpr int64_t kGrain = 1 << 15;  // under so many steps, some tens of microseconds, a thread does not pay
  const int64_t grain = 1 + kGrain / std::max<int64_t>(work, 1);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    run(body, begin, end, make_scratch(bytes).get());
  });
}

#if BCMFNET_WITH_CUDA

void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  if (function == nullptr) throw std::runtime_error("this torch has no CUDA streams");
  void* stream = nullptr;
  if (function(device, &stream) != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch has no stream on this device");
  return stream;
}

extern "C" const char* bcmfnet_cuda_error(int error);

void check_cuda(int error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA: ") + bcmfnet_cuda_error(error));
}

torch::stable::Tensor make_cuda_scratch(int64_t bytes, const torch::stable::Tensor& like) {
  return torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte, std::nullopt, like.device());
}

#endif

}  // namespace bcmfnet
