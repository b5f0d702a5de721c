// What the threads of a block and of a grid do together.
#include "common/launch.h"

namespace {

__constant__ float kTaps[3] = {0.25f, 0.5f, 0.25f};

__device__ int launches;

// Twelve numbers a thread: its indices and sizes.
__global__ void indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* mine = out + 12 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  const unsigned numbers[12] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
                                blockDim.x,  blockDim.y,  blockDim.z,  gridDim.x,  gridDim.y,  gridDim.z};
  for (int i = 0; i < 12; ++i) mine[i] = static_cast<int>(numbers[i]);
}

__global__ void no_arguments() { atomicAdd(&launches, 1); }
__global__ void take(int* out) { *out = atomicExch(&launches, 0); }

// Sums of a block, halving in shared memory.
template <typename T, int kThreads>
__global__ void sums(const T* in, T* out, int n) {
  __shared__ T part[kThreads];
  T sum = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += kThreads * gridDim.x) sum += in[i];
  part[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) part[threadIdx.x] += part[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

// The first `stay` threads of a block meet; the others have left.
__global__ void votes(const int* in, int* out, int stay) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= stay) return;
  out[3 * i] = __syncthreads_count(in[i]);
  out[3 * i + 1] = __syncthreads_or(in[i]);
  out[3 * i + 2] = __syncthreads_and(in[i]);
}

// Each block's part turned around in dynamic shared memory, behind as many bytes of another type.
__global__ void turn(const double* in, double* out) {
  BCM_DYNAMIC_SHARED(double, tile);
  unsigned char* order = reinterpret_cast<unsigned char*>(tile + blockDim.x);
  tile[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  order[threadIdx.x] = static_cast<unsigned char>(blockDim.x - 1 - threadIdx.x);
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = tile[order[threadIdx.x]];
}

__global__ void unwritten(float* out) {
  __shared__ float tile[2];
  BCM_DYNAMIC_SHARED(float, dynamic);
  out[2 * blockIdx.x] = tile[1];
  out[2 * blockIdx.x + 1] = dynamic[1];
  tile[1] = dynamic[1] = 5;
}

__global__ void smooth(const float* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[i] = __fmaf_rn(kTaps[0], __ldg(in + max(i - 1, 0)), kTaps[1] * in[i] + kTaps[2] * in[min(i + 1, n - 1)]);
}

template <int kBins>
__global__ void histogram(const unsigned char* in, unsigned* bins, int n) {
  __shared__ unsigned mine[kBins];
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) mine[bin] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) atomicAdd(&mine[in[i]], 1u);
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) atomicAdd(&bins[bin], mine[bin]);
}

__global__ void atomics(const int* in, int* ints, unsigned* words, unsigned long long* wide, float* single,
                        double* full, int* old) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, value = in[i];
  const unsigned word = static_cast<unsigned>(value);
  old[i] = atomicAdd(&ints[0], 1);
  atomicAdd(&ints[1], value);
  atomicMax(&ints[2], value);
  atomicMin(&ints[3], value);
  for (int seen = ints[4], expected = ~seen; seen != expected;) {  // a sum by compare-and-swap
    expected = seen;
    seen = atomicCAS(&ints[4], expected, expected + value);
  }
  atomicAnd(&words[0], word);
  atomicOr(&words[1], word);
  atomicXor(&words[2], word);
  atomicMax(&words[3], word);
  atomicMin(&words[4], word);
  atomicAdd(wide, 1ull << 33);
  atomicAdd(single, 0.5f);
  atomicAdd(full, 0.25);
  __threadfence();
}

}  // namespace

extern "C" {

int write_indices(int* out, int gx, int gy, int gz, int bx, int by, int bz) {
  BCM_LAUNCH(indices, dim3(gx, gy, gz), dim3(bx, by, bz), 0, nullptr, out);
  return cudaGetLastError();
}

int count_launches(int blocks, int* out) {
  BCM_LAUNCH(no_arguments, blocks, 32, 0, nullptr);
  BCM_LAUNCH(take, 1, 1, 0, nullptr, out);
  return cudaGetLastError();
}

int sums_float32(const float* in, float* out, int n, int blocks) {
  BCM_LAUNCH((sums<float, 256>), blocks, 256, 0, nullptr, in, out, n);
  return cudaGetLastError();
}
int sums_float64(const double* in, double* out, int n, int blocks) {
  BCM_LAUNCH((sums<double, 64>), blocks, 64, 0, nullptr, in, out, n);
  return cudaGetLastError();
}

int vote_block(const int* in, int* out, int n, int stay) {
  BCM_LAUNCH(votes, n / 96, 96, 0, nullptr, in, out, stay);
  return cudaGetLastError();
}

int turn_blocks(const double* in, double* out, int n) {
  BCM_LAUNCH(turn, n / 160, 160, 160 * (sizeof(double) + 1), nullptr, in, out);
  return cudaGetLastError();
}

int read_unwritten(float* out, int blocks) {
  BCM_LAUNCH(unwritten, blocks, 1, 2 * sizeof(float), nullptr, out);
  return cudaGetLastError();
}

int smooth_row(const float* in, float* out, int n) {
  BCM_LAUNCH(smooth, (n + 127) / 128, 128, 0, nullptr, in, out, n);
  return cudaGetLastError();
}

int histogram_of(const unsigned char* in, unsigned* bins, int n) {
  int device = 0, multiprocessors = 0;
  BCM_TRY(cudaGetDevice(&device));
  BCM_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  BCM_TRY(cudaMemsetAsync(bins, 0, 256 * sizeof(unsigned), nullptr));
  BCM_LAUNCH(histogram<256>, 4 * multiprocessors, 96, 0, nullptr, in, bins, n);
  return cudaGetLastError();
}

int all_atomics(const int* in, int n, int* ints, unsigned* words, unsigned long long* wide, float* single, double* full,
                int* old) {
  BCM_LAUNCH(atomics, n / 64, 64, 0, nullptr, in, ints, words, wide, single, full, old);
  return cudaGetLastError();
}

int copy_bytes(const void* from, void* to, int bytes) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr);
}

// A launch with `bytes` of shared memory, of which more than 48 KiB must be asked for.
int much_shared(const double* in, double* out, int bytes, int ask) {
  if (ask) BCM_TRY(cudaFuncSetAttribute(turn, cudaFuncAttributeMaxDynamicSharedMemorySize, ask));
  BCM_LAUNCH(turn, 1, 160, bytes, nullptr, in, out);
  return cudaGetLastError();
}

}
