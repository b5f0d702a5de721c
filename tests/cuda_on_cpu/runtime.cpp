// Runs the blocks of a launch; cuda_runtime.h says how.
#include <link.h>

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "block.h"
#include "accepted.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

unsigned lane;
unsigned char* dynamic_shared;

namespace {

// The __shared__ variables, but those of a build with ASAN: all that this library has of thread-local memory.
struct StaticShared {
  char* begin = nullptr;
  size_t bytes = 0;

  StaticShared() { dl_iterate_phdr(&look, this); }
  void fill() const { std::memset(begin, 0xff, bytes); }

  static int look(dl_phdr_info* library, size_t, void* result) {
    static thread_local char anchor;
    const auto begin = static_cast<char*>(library->dlpi_tls_data);
    for (const auto* part = library->dlpi_phdr; part < library->dlpi_phdr + library->dlpi_phnum; ++part) {
      if (part->p_type != PT_TLS || begin > &anchor || begin + part->p_memsz <= &anchor) continue;
      static_cast<StaticShared*>(result)->begin = begin;
      static_cast<StaticShared*>(result)->bytes = part->p_memsz;
      return 1;
    }
    return 0;
  }
};

std::mutex one_launch;
std::map<const void*, size_t> allowed_shared;
cudaError_t last_error = cudaSuccess;
std::string last_text;

void record(cudaError_t error, const Launch& launch, const std::string& reason) {
  const std::string name = launch.name;
  last_error = error;
  last_text = (name.front() == '(' ? name.substr(1, name.size() - 2) : name) + reason;
}

}  // namespace

const uint64_t* meet(const char* call, uint64_t mask, uint64_t value, Here here) {
  return Block::running->meet({call, mask, here}, value);
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > kMostShared) return last_error = cudaErrorInvalidValue;
  allowed_shared[kernel] = std::max<size_t>(bytes, kDefaultShared);
  return cudaSuccess;
}

void run(const Launch& launch, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const auto allowed = allowed_shared.find(launch.kernel);
  if (!accepted(launch.grid, launch.block, launch.shared,
                allowed == allowed_shared.end() ? kDefaultShared : allowed->second)) {
    return record(cudaErrorInvalidConfiguration, launch, refusal(launch.grid, launch.block, launch.shared));
  }
  const StaticShared static_shared;
  Block block(launch.block, thread);
  blockDim = launch.block, gridDim = launch.grid;
  bool forward = true;
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x, forward = !forward) {
        blockIdx = {x, y, z};
        static_shared.fill();
        const std::unique_ptr<unsigned char[]> shared(new unsigned char[launch.shared]);
        std::memset(shared.get(), 0xff, launch.shared);
        dynamic_shared = shared.get();
        try {
          block.run(forward);
        } catch (const std::runtime_error& error) {
          return record(cudaErrorLaunchFailure, launch, ", block " + text(blockIdx) + ": " + error.what());
        }
      }
    }
  }
}

}  // namespace cuda_on_cpu

cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidValue ? "invalid argument" : cuda_on_cpu::last_text.c_str();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::kMultiprocessors : cuda_on_cpu::kMostShared;
  return cudaSuccess;
}
