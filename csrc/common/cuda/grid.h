// Blocks, warps and their shared memory.
#pragma once

#include "common/integers.h"
#include "common/launch.h"

namespace bcmfnet {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int64_t kMostShared = 96 << 10;     // A block may have so many bytes on every GPU from sm_80 on,
constexpr int64_t kSharedUnasked = 48 << 10;  // but it must ask for more than these.

inline unsigned blocks_for(int64_t items, int64_t each) { return static_cast<unsigned>(ceil_div(items, each)); }

// Launches with `bytes` of dynamic shared memory; returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int launch_with_shared(
    void (*kernel)(Parameters...), dim3 grid, unsigned threads, int64_t bytes, void* stream,
    const Arguments&... arguments) {
  if (bytes > kSharedUnasked) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    BCM_TRY(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(bytes)));
  }
  BCM_LAUNCH(kernel, grid, threads, static_cast<size_t>(bytes), stream, arguments...);
  return cudaGetLastError();
}

}  // namespace bcmfnet
