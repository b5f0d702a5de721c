// CUDA as far as this project's .cu files use it, in plain C++17, so that they run on a CPU, under a debugger or a
// sanitizer. build.py compiles a .cu as C++ with this folder first on the include path, and links runtime.cpp. A
// kernel starts through BCM_LAUNCH and has run when that returns.
//
// Blocks run one after another; the threads of a block are fibers. Each warp runs as far as it can before the next one
// starts, and so does each lane in it; in every second block the last warp and the last lane come first. Shared memory
// holds 0xff bytes (NaN) before each block. So a missing barrier gives wrong results at every run, if not in one block
// then in the next: a launch of two blocks or more shows it.
//
// Errors: a block in which no thread can go on (a divergent barrier, a mask that names a lane which has exited) ends
// its launch. cudaGetLastError() then returns cudaErrorLaunchFailure, and cudaGetErrorString() tells kernel, block,
// threads and the lines they wait at. Stricter than hardware: a mask may not name lanes that have exited or never were,
// and all threads must meet on one source line. What a shuffle reads from outside its mask is 0xff bytes. A kernel that
// divides by zero or reads astray takes the process with it: build with sanitize=True to learn where. There dynamic
// shared memory ends at its last byte, and static arrays have guards (those of templates in an anonymous namespace
// alone), but no 0xff.
//
// Not modelled: memory ordering, threads that spin on memory, cp.async, TMA, wgmma, textures, clocks, the size of
// static shared memory, and the errors of __expf and its kind.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // ASAN guards no thread_local variable
#else
#define __shared__ static thread_local  // so that runtime.cpp finds all of them in one piece, to fill it
#endif

#define CUDA_ON_CPU_VECTORS(T, name)                                                                \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                \
  struct name##3 { T x, y, z; };                                                                    \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };                     \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                        \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(signed char, char)
CUDA_ON_CPU_VECTORS(unsigned char, uchar)
CUDA_ON_CPU_VECTORS(short, short)
CUDA_ON_CPU_VECTORS(unsigned short, ushort)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(long long, longlong)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum [[nodiscard]] cudaError_t {  // code that drops an error does not compile, see build.py
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};

constexpr int warpSize = 32;
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_cpu {

// The source line of a call, as the default argument of the function that is called.
struct Here {
  const char* file;
  int line;
  Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};

constexpr uint64_t kWholeBlock = ~uint64_t{0};  // in place of a mask of lanes

extern unsigned lane;                  // of the running thread in its warp
extern unsigned char* dynamic_shared;  // of the running block

// Wait for the lanes of `mask`, or the whole block, to make the same call. Then: the lanes' values, or of a block how
// many values were not 0 and how many threads took part. They stay until the running thread's next call.
const uint64_t* meet(const char* call, uint64_t mask, uint64_t value, Here here);

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared;
};

void run(const Launch& launch, const std::function<void()>& thread);
cudaError_t allow_shared(const void* kernel, int bytes);

template <typename... Parameters>
auto launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* /*stream*/) {
  return [=](Parameters... arguments) {
    run({name, reinterpret_cast<const void*>(kernel), grid, block, shared}, [&] { kernel(arguments...); });
  };
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(std::is_trivially_copyable<From>::value && std::is_trivially_copyable<To>::value, "a value of bits");
  To to{};
  std::memcpy(&to, &from, std::min(sizeof(to), sizeof(from)));
  return to;
}

template <typename T>
T shuffle(const char* call, unsigned mask, T value, unsigned source, Here here) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
  const uint64_t* values = meet(call, mask, bits_as<uint64_t>(value), here);
  return bits_as<T>(mask >> source & 1 ? values[source] : ~uint64_t{0});
}

template <typename T, typename Combine>
T reduce(const char* call, unsigned mask, T value, Combine combine, Here here) {
  const uint64_t* values = meet(call, mask, bits_as<uint64_t>(value), here);
  T result = bits_as<T>(values[__builtin_ctz(mask)]);
  for (unsigned rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    result = combine(result, bits_as<T>(values[__builtin_ctz(rest)]));
  }
  return result;
}

template <typename T, typename Change>
T atomic(T* at, Change change) {
  const T old = *at;
  *at = static_cast<T>(change(old));
  return old;
}

// Keeps the compiler from fusing the operation that made `value` with the next one.
inline float rounded(float value) {
  asm("" : "+m"(value));
  return value;
}

template <typename T>
struct Same {
  using type = T;  // deduces nothing: the pointer alone decides the type of an atomic
};
template <typename T>
using As = typename Same<T>::type;

}  // namespace cuda_on_cpu

#define BCM_LAUNCH(kernel, grid, block, smem, stream, ...) \
  cuda_on_cpu::launch(#kernel, kernel, grid, block, smem, stream)(__VA_ARGS__)
#define BCM_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuda_on_cpu::dynamic_shared)

inline void __syncthreads(cuda_on_cpu::Here here = {}) { meet("__syncthreads", cuda_on_cpu::kWholeBlock, 0, here); }
inline int __syncthreads_count(int predicate, cuda_on_cpu::Here here = {}) {
  return static_cast<int>(meet("__syncthreads_count", cuda_on_cpu::kWholeBlock, predicate != 0, here)[0]);
}
inline int __syncthreads_or(int predicate, cuda_on_cpu::Here here = {}) {
  return meet("__syncthreads_or", cuda_on_cpu::kWholeBlock, predicate != 0, here)[0] != 0;
}
inline int __syncthreads_and(int predicate, cuda_on_cpu::Here here = {}) {
  const uint64_t* votes = meet("__syncthreads_and", cuda_on_cpu::kWholeBlock, predicate != 0, here);
  return votes[0] == votes[1];
}

inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_on_cpu::Here here = {}) { meet("__syncwarp", mask, 0, here); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, cuda_on_cpu::Here here = {}) {
  const unsigned first = cuda_on_cpu::lane & -width;
  return shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), here);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, cuda_on_cpu::Here here = {}) {
  const unsigned lane = cuda_on_cpu::lane, place = lane & (width - 1);
  return shuffle("__shfl_up_sync", mask, value, delta <= place ? lane - delta : lane, here);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, cuda_on_cpu::Here here = {}) {
  const unsigned lane = cuda_on_cpu::lane, place = lane & (width - 1);
  return shuffle("__shfl_down_sync", mask, value, place + delta < unsigned(width) ? lane + delta : lane, here);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, cuda_on_cpu::Here here = {}) {
  const unsigned lane = cuda_on_cpu::lane, last = lane | (width - 1), source = lane ^ lanes;
  return shuffle("__shfl_xor_sync", mask, value, source <= last ? source : lane, here);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_on_cpu::Here here = {}) {
  const unsigned bit = predicate ? 1u << cuda_on_cpu::lane : 0u;
  return cuda_on_cpu::reduce("__ballot_sync", mask, bit, std::bit_or<unsigned>(), here);
}
inline int __any_sync(unsigned mask, int predicate, cuda_on_cpu::Here here = {}) {
  return cuda_on_cpu::reduce("__any_sync", mask, predicate != 0, std::logical_or<bool>(), here);
}
inline int __all_sync(unsigned mask, int predicate, cuda_on_cpu::Here here = {}) {
  return cuda_on_cpu::reduce("__all_sync", mask, predicate != 0, std::logical_and<bool>(), here);
}

#define CUDA_ON_CPU_REDUCE(name, expression)                                                  \
  template <typename T>                                                                       \
  T name(unsigned mask, T value, cuda_on_cpu::Here here = {}) {                               \
    return cuda_on_cpu::reduce(#name, mask, value, [](T a, T b) { return expression; }, here); \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, a + b)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, std::min(a, b))
CUDA_ON_CPU_REDUCE(__reduce_max_sync, std::max(a, b))
CUDA_ON_CPU_REDUCE(__reduce_and_sync, a & b)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, a | b)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, a ^ b)

#define CUDA_ON_CPU_ATOMIC(name, expression)                                        \
  template <typename T>                                                             \
  T name(T* at, cuda_on_cpu::As<T> value) {                                         \
    return cuda_on_cpu::atomic(at, [value](T old) { return expression; });          \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, old - value)
CUDA_ON_CPU_ATOMIC(atomicMin, std::min(old, value))
CUDA_ON_CPU_ATOMIC(atomicMax, std::max(old, value))
CUDA_ON_CPU_ATOMIC(atomicAnd, old & value)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicExch, (static_cast<void>(old), value))
template <typename T>
T atomicCAS(T* at, cuda_on_cpu::As<T> expected, cuda_on_cpu::As<T> value) {
  return cuda_on_cpu::atomic(at, [=](T old) { return old == expected ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

#define CUDA_ON_CPU_LOAD(name) \
  template <typename T>        \
  T name(const T* at) { return *at; }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldcg)
template <typename T>
void __stcs(T* at, cuda_on_cpu::As<T> value) { *at = value; }
template <typename T>
void __stcg(T* at, cuda_on_cpu::As<T> value) { *at = value; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1) << (31 - bit);
  return result;
}

inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned long long>(x) * y >> 32; }

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline unsigned __vmaxu2(unsigned x, unsigned y) {
  return std::max(x & 0xffff, y & 0xffff) | std::max(x >> 16, y >> 16) << 16;
}

inline int __float_as_int(float x) { return cuda_on_cpu::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_as<float>(x); }

inline float __fadd_rn(float a, float b) { return cuda_on_cpu::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return cuda_on_cpu::rounded(a - b); }
inline float __fmul_rn(float a, float b) { return cuda_on_cpu::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) noexcept { return expf(x); }
inline float __logf(float x) noexcept { return logf(x); }
inline float __log2f(float x) noexcept { return log2f(x); }

// Of floating-point numbers the one that is not NaN, as in device code.
template <typename A, typename B, typename C = std::common_type_t<A, B>>
std::enable_if_t<std::is_arithmetic<C>::value, C> min(A a, B b) {
  if constexpr (std::is_floating_point<C>::value) return std::fmin(C(a), C(b));
  return C(b) < C(a) ? C(b) : C(a);
}
template <typename A, typename B, typename C = std::common_type_t<A, B>>
std::enable_if_t<std::is_arithmetic<C>::value, C> max(A a, B b) {
  if constexpr (std::is_floating_point<C>::value) return std::fmax(C(a), C(b));
  return C(a) < C(b) ? C(b) : C(a);
}

enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = struct CUstream_st*;

extern "C" cudaError_t cudaGetLastError();  // and forgets it; its text stays until the next one
extern "C" const char* cudaGetErrorString(cudaError_t error);
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
