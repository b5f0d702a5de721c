// The room of the selection: non-maximum suppression, and the threshold by rank (radix_select_cuda.h).
#include "bcl/pixels_cuda.h"

namespace bcmfnet {
namespace {

// The largest score of a row's columns x - reach to x + reach.
__device__ int largest_around(const uint16_t* row, int x, int reach, int width) {
  int largest = 0;
  for (int i = x - reach; i <= x + reach; ++i) largest = i >= 0 && i < width ? max(largest, int(row[i])) : largest;
  return largest;
}

// One bit for each candidate, and their high bytes counted. The largest scores of kReach rows to either side are held;
// kReach -1 stands for any window.
template <int kReach>
__global__ void __launch_bounds__(kThreads) candidates_kernel(const Bcl call, const Scratch scratch) {
  __shared__ uint32_t bins[kBins];
  bins[threadIdx.x] = 0;
  __syncthreads();
  const Patch patch(call);
  const int width = static_cast<int>(call.target.width), height = static_cast<int>(call.target.height);
  const int reach = kReach >= 0 ? kReach : static_cast<int>(call.options.nms / 2);
  const uint16_t* scores = scratch.score + patch.image * call.target.height * scratch.score_pitch;
  const auto largest_of = [&](int y) {
    const bool known = patch.inside && y >= 0 && y < height;
    return known ? largest_around(scores + y * scratch.score_pitch, patch.x, reach, width) : 0;
  };
  constexpr int kHeld = kReach >= 0 ? 2 * kReach + 1 : 1;
  int held[kHeld];
#pragma unroll
  for (int i = 1; i < kHeld; ++i) held[i] = largest_of(patch.begin - reach + i - 1);
  for (int y = patch.begin; y < patch.end; ++y) {
    int largest = 0;
    if (kReach >= 0) {
#pragma unroll
      for (int i = 1; i < kHeld; ++i) held[i - 1] = held[i];
      held[kHeld - 1] = largest_of(y + reach);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) largest = max(largest, held[i]);
    } else {
      for (int i = y - reach; i <= y + reach; ++i) largest = max(largest, largest_of(i));
    }
    const int score = patch.inside ? scores[y * scratch.score_pitch + patch.x] : 0;
    const bool candidate = score != 0 && score == largest;
    const unsigned word = __ballot_sync(kFullWarp, candidate);
    const int64_t row = patch.image * call.target.height + y;
    if (patch.inside && threadIdx.x % 32 == 0) scratch.candidates[row * scratch.words + patch.x / 32] = word;
    count_bins(bins, candidate, score >> 8);
  }
  __syncthreads();
  Histogram& histogram = scratch.histogram[call.options.per_image ? patch.image : 0];
  if (bins[threadIdx.x] != 0) atomicAdd(&histogram.high[threadIdx.x], bins[threadIdx.x]);
}

// Counts of the candidates that share a sought high byte, by their low byte.
__global__ void __launch_bounds__(kThreads) low_bytes_kernel(const Bcl call, const Scratch scratch) {
  __shared__ uint32_t bins[kSoughtBytes][kBins];
  __shared__ int sought[kSoughtBytes];
  const Patch patch(call);
  Histogram& histogram = scratch.histogram[call.options.per_image ? patch.image : 0];
  for (int i = 0; i < kSoughtBytes; ++i) bins[i][threadIdx.x] = 0;
  if (threadIdx.x < 32) {
    const Sought bytes(histogram, call.options.selection);
    if (threadIdx.x < kSoughtBytes) sought[threadIdx.x] = bytes.byte(threadIdx.x);
  }
  __syncthreads();
  for (int y = patch.begin; y < patch.end; ++y) {
    const int score = patch.inside ? score_of_candidate(scratch, patch.image * call.target.height + y, patch.x) : -1;
    for (int i = 0; i < kSoughtBytes; ++i)
      count_bins(bins[i], score >= 0 && score >> 8 == sought[i], score & (kBins - 1));
  }
  __syncthreads();
  for (int i = 0; i < kSoughtBytes; ++i)
    if (bins[i][threadIdx.x] != 0) atomicAdd(&histogram.low[i][threadIdx.x], bins[i][threadIdx.x]);
}

// At full resolution: mask and boundary term of the selected pixels.
__global__ void __launch_bounds__(kThreads) select_kernel(
    const Bcl call, const Scratch scratch, uint8_t* mask) {
  const Patch patch(call);
  float sum = 0;
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t at = (patch.image * call.target.height + y) * call.target.width + patch.x;
    const bool selected = is_selected(call, scratch, patch.image, y, patch.x);
    if (mask) mask[at] = selected;
    if (selected) sum += scratch.term[at];
  }
  write_sum(sum, scratch.boundary + block_number());
}

}  // namespace

int launch_candidates(const Bcl& call, const Scratch& scratch, void* stream) {
  const dim3 grid = pixel_grid(call);
  BCM_TRY(cudaMemsetAsync(
      scratch.histogram, 0, scratch.groups * sizeof(Histogram), static_cast<cudaStream_t>(stream)));
  switch (call.options.nms) {
    case 1: BCM_LAUNCH(candidates_kernel<0>, grid, kThreads, 0, stream, call, scratch); break;
    case 3: BCM_LAUNCH(candidates_kernel<1>, grid, kThreads, 0, stream, call, scratch); break;
    case 5: BCM_LAUNCH(candidates_kernel<2>, grid, kThreads, 0, stream, call, scratch); break;
    case 7: BCM_LAUNCH(candidates_kernel<3>, grid, kThreads, 0, stream, call, scratch); break;
    default: BCM_LAUNCH(candidates_kernel<-1>, grid, kThreads, 0, stream, call, scratch); break;
  }
  BCM_LAUNCH(low_bytes_kernel, grid, kThreads, 0, stream, call, scratch);
  return cudaGetLastError();
}

int launch_selection(const Bcl& call, const Scratch& scratch, uint8_t* mask, void* stream) {
  BCM_LAUNCH(select_kernel, pixel_grid(call), kThreads, 0, stream, call, scratch, mask);
  return cudaGetLastError();
}

}  // namespace bcmfnet
