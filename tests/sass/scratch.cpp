// What the bindings allocate themselves: kernels may touch it, and it holds no numbers.
#include <algorithm>
#include <cstring>
#include <utility>

#include "common/tensor.h"

extern "C" void sass_allow(const void* begin, uint64_t bytes);

static int64_t most_bytes = 0;

// The most that a call has asked for since this was asked last.
extern "C" int64_t sass_scratch() { return std::exchange(most_bytes, 0); }

extern "C" torch::stable::Tensor make_real_scratch(int64_t bytes, const torch::stable::Tensor& like) __asm__(
    "__real__ZN7bcmfnet17make_cuda_scratchElRKN5torch6stable6TensorE");
extern "C" torch::stable::Tensor make_known_scratch(int64_t bytes, const torch::stable::Tensor& like) __asm__(
    "__wrap__ZN7bcmfnet17make_cuda_scratchElRKN5torch6stable6TensorE");

torch::stable::Tensor make_known_scratch(int64_t bytes, const torch::stable::Tensor& like) {
  most_bytes = std::max(most_bytes, bytes);
  torch::stable::Tensor result = make_real_scratch(bytes, like);
  std::memset(result.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
  sass_allow(result.mutable_data_ptr(), static_cast<uint64_t>(bytes));
  return result;
}
