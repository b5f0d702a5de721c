// The part of the CUDA runtime that nvcc's objects call: they register their kernels, and a launch runs the machine
// code that was disassembled from them. A launch has run when it returns.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "../cuda_on_cpu/accepted.h"
#include "emulator.h"

// All kernels, see listing.cpp.
extern "C" const char sass_listing[], sass_listing_end[];

namespace sass {
namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

struct Runtime {
  std::mutex mutex;
  Module module{std::string(sass_listing, static_cast<size_t>(sass_listing_end - sass_listing))};
  std::map<const void*, std::string> names;  // of kernels
  std::map<const void*, size_t> allowed_shared;
  std::vector<Configuration> configurations;
  Allocations allocations;
  bool counts_sectors = false;
  std::map<std::string, Counts> counts;
  cudaError_t last_error = cudaSuccess;
  std::string last_text, report;
};

Runtime& runtime() {
  static Runtime* const only = new Runtime;  // objects of the library may still call it when a process ends
  return *only;
}

cudaError_t record(cudaError_t error, const std::string& text) {
  runtime().last_text = text;
  return runtime().last_error = error;
}

Size size_of(dim3 size) { return {size.x, size.y, size.z}; }

cudaError_t launch(const std::string& name, const Configuration& wanted, size_t allowed_shared, void** arguments) {
  Runtime& own = runtime();
  if (!cuda_on_cpu::accepted(wanted.grid, wanted.block, wanted.shared, allowed_shared)) {
    return record(cudaErrorInvalidConfiguration,
                  demangled(name) + cuda_on_cpu::refusal(wanted.grid, wanted.block, wanted.shared));
  }
  try {
    const Kernel& kernel = own.module.kernel(name);
    Launch launch{size_of(wanted.grid), size_of(wanted.block), static_cast<unsigned>(wanted.shared), {}};
    for (size_t i = 0; i < kernel.arguments.size(); ++i) {
      const auto [offset, bytes] = kernel.arguments[i];
      launch.parameters.resize(offset + bytes);
      std::memcpy(launch.parameters.data() + offset, arguments[i], bytes);
    }
    run(kernel, launch, own.allocations, own.counts_sectors, own.counts[name]);
  } catch (const std::exception& error) {
    return record(cudaErrorLaunchFailure, error.what());
  }
  return cudaSuccess;
}

cudaError_t launch(const void* handle, const Configuration& wanted, void** arguments) {
  Runtime& own = runtime();
  const std::lock_guard<std::mutex> lock(own.mutex);
  const auto name = own.names.find(handle);
  if (name == own.names.end()) return record(cudaErrorInvalidDeviceFunction, "a kernel that is not registered");
  const auto allowed = own.allowed_shared.find(handle);
  return launch(name->second, wanted,
                allowed == own.allowed_shared.end() ? cuda_on_cpu::kDefaultShared : allowed->second, arguments);
}

// One line for each kernel that has run: its name and figures, then the instructions of each class.
std::string report(Runtime& own) {
  std::ostringstream text;
  for (const auto& [name, counts] : own.counts) {
    const Kernel& kernel = own.module.kernel(name);
    std::map<std::string, uint64_t> classes;
    uint64_t requests[2] = {}, sectors[2] = {};
    for (size_t i = 0; i < kernel.code.size(); ++i) {
      const Instruction& instruction = kernel.code[i];
      std::string kind = name_of(instruction.kind);
      if (instruction.kind >= Class::kGlobalLoad && instruction.kind <= Class::kLocal)
        kind += " " + std::to_string(instruction.bytes);
      if (counts.executed[i]) classes[kind] += counts.executed[i];
      const bool reads = instruction.op == Op::kGlobalLoad || instruction.op == Op::kCopyToShared;
      requests[!reads] += counts.requests[i], sectors[!reads] += counts.sectors[i];
    }
    text << kernel.name << "\t" << counts.launches << "\t" << counts.blocks << "\t" << counts.warps << "\t"
         << counts.threads << "\t" << kernel.registers << "\t" << counts.shared << "\t" << requests[0] << "\t"
         << sectors[0] << "\t" << requests[1] << "\t" << sectors[1] << "\t" << counts.sectors_read << "\t"
         << counts.sectors_written;
    for (const auto& [kind, count] : classes) text << "\t" << kind << "=" << count;
    text << "\n";
  }
  return text.str();
}

// What the lines of the sources have issued: kernel, file and line, instructions.
std::string lines(Runtime& own) {
  std::ostringstream text;
  for (const auto& [name, counts] : own.counts) {
    const Kernel& kernel = own.module.kernel(name);
    std::map<std::string_view, uint64_t> lines;
    for (size_t i = 0; i < kernel.code.size(); ++i) lines[kernel.sources[i]] += counts.executed[i];
    for (const auto& [line, count] : lines)
      if (count) text << kernel.name << "\t" << line << "\t" << count << "\n";
  }
  return text.str();
}

}  // namespace
}  // namespace sass

extern "C" {

// What the tests call.
void sass_allow(const void* begin, uint64_t bytes) {
  sass::runtime().allocations.add(reinterpret_cast<uint64_t>(begin), bytes);
}
void sass_forget() { sass::runtime().allocations.clear(); }
void sass_error(int error) { sass::set_error(static_cast<sass::Error>(error)); }
void sass_count(bool sectors) {
  sass::runtime().counts.clear();
  sass::runtime().counts_sectors = sectors;
}
const char* sass_report() {
  sass::Runtime& own = sass::runtime();
  return (own.report = report(own)).c_str();
}
const char* sass_lines() {
  sass::Runtime& own = sass::runtime();
  return (own.report = lines(own)).c_str();
}

// Kernels that no object of this library registers, as cubin.py lists them.
void sass_add(const char* listing) { sass::runtime().module.add(listing, true); }

// Launches one of them; returns what went wrong, or null. `arguments` points at each.
const char* sass_launch(const char* name, const unsigned* grid, unsigned threads, unsigned shared, void** arguments) {
  sass::Runtime& own = sass::runtime();
  const std::lock_guard<std::mutex> lock(own.mutex);
  const sass::Configuration wanted{dim3(grid[0], grid[1], grid[2]), dim3(threads), shared, nullptr};
  const cudaError_t error = sass::launch(std::string(name), wanted, cuda_on_cpu::kMostShared, arguments);
  return error == cudaSuccess ? nullptr : own.last_text.c_str();
}

const char* sass_text(const char* part) {
  sass::Runtime& own = sass::runtime();
  return (own.report = own.module.listing(part)).c_str();
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  sass::runtime().names[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  sass::runtime().configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const sass::Configuration last = sass::runtime().configurations.back();
  sass::runtime().configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return sass::launch(kernel, {grid, block, shared, stream}, arguments);
}
cudaError_t cudaLaunchKernel(
    const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return sass::launch(stub, {grid, block, shared, stream}, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  return sass::launch(
      stub, {config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream}, arguments);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > cuda_on_cpu::kMostShared) return sass::runtime().last_error = cudaErrorInvalidValue;
  sass::runtime().allowed_shared[stub] = std::max<size_t>(value, cuda_on_cpu::kDefaultShared);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  const auto begin = reinterpret_cast<uint64_t>(to);
  const sass::Allocations::Range* range = sass::runtime().allocations.find(begin, bytes);
  if (bytes != 0 && (range == nullptr || begin < range->begin || begin + bytes > range->end))
    return sass::record(cudaErrorLaunchFailure, "cudaMemsetAsync: writes outside of what is allocated");
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = cuda_on_cpu::kMultiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: *value = cuda_on_cpu::kMostShared;
  }
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return sass::runtime().last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = sass::runtime().last_error;
  sass::runtime().last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorInvalidValue ? "invalid argument" : sass::runtime().last_text.c_str();
}
}
