// What the bindings share: element types, registration, and the launch of a CUDA kernel on torch's current stream.
#pragma once

#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/view.h"

// BCM_SCHEMA declares private ops, BCM_SERVE names what serves one, and BCM_RUN(tensor, cpu, cuda) is the one of two
// expressions that is for the tensor's device; the second has the `stream` and is a cudaError_t. Where the CUDA sources
// are compiled for the CPU (tests/cuda_on_cpu) or their machine code is executed there (tests/sass), the same ops stand
// in the library that BCM_CUDA_ON_CPU names, and the CUDA code serves CPU tensors.
#define BCM_SERVE_ON(device, name, function) \
  STABLE_TORCH_LIBRARY_IMPL(BCM_LIBRARY, device, m) { m.impl(name, TORCH_BOX(&function)); }
#define BCM_RUN_CUDA(tensor, cuda) launch(tensor, [&](void* stream) { return cuda; })
#if defined(BCM_CUDA_ON_CPU)
#define BCM_LIBRARY BCM_CUDA_ON_CPU
#define BCM_SERVE(name, function) BCM_SERVE_ON(CPU, name, function)
#define BCM_RUN(tensor, cpu, cuda) BCM_RUN_CUDA(tensor, cuda)
#elif BCMFNET_WITH_CUDA
#define BCM_SERVE(name, function) BCM_SERVE_ON(CPU, name, function) BCM_SERVE_ON(CUDA, name, function)
#define BCM_RUN(tensor, cpu, cuda) tensor.is_cuda() ? BCM_RUN_CUDA(tensor, cuda) : static_cast<void>(cpu)
#else
#define BCM_SERVE(name, function) BCM_SERVE_ON(CPU, name, function)
#define BCM_RUN(tensor, cpu, cuda) static_cast<void>(cpu)
#endif
// The namespace of the ops, as NAMESPACE in bcmfnet/ops/_library.py: two builds of different names live in one process.
#if !defined(BCM_LIBRARY)
#define BCM_LIBRARY bcmfnet
#endif
#define BCM_SCHEMA STABLE_TORCH_LIBRARY_FRAGMENT(BCM_LIBRARY, m)

namespace bcmfnet {

DType dtype_of(const torch::stable::Tensor& tensor);

// Of a tensor [batch, channels, height, width] that a kernel reads, or writes.
View view_of(const torch::stable::Tensor& tensor);
View output_view_of(torch::stable::Tensor& tensor);

template <typename T>
T* data_of(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Memory that a CPU kernel works in: not cleared, aligned to the lines of a cache.
constexpr std::align_val_t kLine{64};
struct FreeScratch {
  void operator()(void* memory) const { operator delete(memory, kLine); }
};
using Scratch = std::unique_ptr<void, FreeScratch>;
inline Scratch make_scratch(int64_t bytes) { return Scratch(operator new(static_cast<size_t>(bytes), kLine)); }

// On torch's threads, see parallel.h.
void run_tasks(int64_t tasks, int64_t work, int64_t bytes, RunRange run, const void* body);

#if BCMFNET_WITH_CUDA

// torch's current stream on a CUDA device. The library does not link to torch's CUDA part, so that it loads without it.
void* current_stream(int32_t device);

void check_cuda(int error);

// Memory that the kernels of a call work in, on a tensor's device: not cleared.
torch::stable::Tensor make_cuda_scratch(int64_t bytes, const torch::stable::Tensor& like);

// Call `kernel(stream)` with the tensor's device current; throws std::runtime_error where it returns a cudaError_t.
template <typename Kernel>
void launch(const torch::stable::Tensor& tensor, Kernel kernel) {
#ifdef BCM_CUDA_ON_CPU
  check_cuda(kernel(nullptr));
#else
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  check_cuda(kernel(current_stream(tensor.get_device_index())));
#endif
}

#endif

}  // namespace bcmfnet
