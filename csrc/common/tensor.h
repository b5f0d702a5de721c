// What the bindings share: element types, and the launch of a CUDA kernel on torch's current stream.
#pragma once

#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

#include "common/dtype.h"

namespace bcmfnet {

constexpr int64_t kGrain = 1 << 15;  // elementary steps, some tens of microseconds, under which a thread does not pay

DType dtype_of(const torch::stable::Tensor& tensor);

// torch's current stream on a CUDA device. The library does not link to torch's CUDA part, so that it loads without it.
void* current_stream(int32_t device);

void check_cuda(int error);

// Call `kernel(stream)` with the tensor's device current; throw std::runtime_error where it returns a cudaError_t.
template <typename Kernel>
void launch(const torch::stable::Tensor& tensor, Kernel kernel) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  check_cuda(kernel(current_stream(tensor.get_device_index())));
}

}  // namespace bcmfnet
