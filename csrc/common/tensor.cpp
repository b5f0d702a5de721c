#include "common/tensor.h"

#include <dlfcn.h>

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

#endif

}  // namespace bcmfnet
