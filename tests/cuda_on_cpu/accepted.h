// The launches that hardware accepts, for both stand-ins of the CUDA runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_on_cpu {

constexpr size_t kDefaultShared = 48 << 10;  // bytes of dynamic shared memory without cudaFuncSetAttribute
constexpr int kMostShared = 227 << 10;       // and with it, on sm_90
constexpr int kMultiprocessors = 2;          // few, so that a grid-stride loop has to loop

template <typename Size>
bool accepted(const Size& grid, const Size& block, size_t shared, size_t allowed) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return threads > 0 && threads <= 1024 && block.z <= 64 && grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 &&
         grid.y <= 65535 && grid.z > 0 && grid.z <= 65535 && shared <= allowed;
}

template <typename Size>
std::string text(const Size& size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
}

template <typename Size>
std::string refusal(const Size& grid, const Size& block, size_t shared) {
  return ": invalid grid " + text(grid) + ", block " + text(block) + " or " + std::to_string(shared) +
         " bytes of dynamic shared memory";
}

}  // namespace cuda_on_cpu
