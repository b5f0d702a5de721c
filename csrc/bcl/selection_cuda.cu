// The room of the selection: non-maximum suppression, and the threshold by rank (radix_select_cuda.h).
#include "bcl/pixels_cuda.h"

namespace bcmfnet {
namespace {

constexpr int kWords = kPacked / 2;  // of the scores of a lane, two in a word
using ScoreWords = Pack<uint32_t, kWords>;

// The largest score of a row's columns x - reach to x + reach.
__device__ int largest_around(const uint16_t* row, int x, int reach, int width) {
  int largest = 0;
  for (int i = max(x - reach, 0); i <= min(x + reach, width - 1); ++i) largest = max(largest, int(row[i]));
  return largest;
}

// The same of all columns of a lane. `row` begins at them; there are neighbours to the left, or to the right.
template <int kReach>
__device__ ScoreWords largest_around(const uint16_t* row, bool has_left, bool has_right) {
  constexpr int kBeside = 2;  // words to either side
  static_assert(kReach < 2 * kBeside, "the neighbours must be read");
  using Beside = Pack<uint32_t, kBeside>;
  const auto words_at = [&](int column) { return reinterpret_cast<const uint32_t*>(row + column); };
  const ScoreWords own = ScoreWords::load(words_at(0));
  ScoreWords largest = own;
  const Beside left = has_left ? Beside::load(words_at(-2 * kBeside)) : Beside{};
  const Beside right = has_right ? Beside::load(words_at(kPacked)) : Beside{};
  const uint32_t words[] = {left.value[0], left.value[1], own.value[0], own.value[1], own.value[2], own.value[3],
                            right.value[0], right.value[1]};
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
#pragma unroll
    for (int step = -kReach; step <= kReach; ++step) {
      if (step == 0) continue;
      // The scores `step` columns beside those of the word.
      const int at = 2 * (word + kBeside) + step;
      const uint32_t pair = at % 2 == 0 ? words[at / 2] : __byte_perm(words[at / 2], words[at / 2 + 1], 0x5432);
      largest.value[word] = __vmaxu2(largest.value[word], pair);
    }
  }
  return largest;
}

// One bit for each candidate: a score that is not 0 and the largest of its window. Where ranks decide the high bytes of
// their scores are counted, else only those from the threshold on are candidates. The largest scores of kReach rows to
// either side are held; kReach -1 stands for any window.
template <int kReach>
__global__ void __launch_bounds__(kThreads) candidates_kernel(const Bcl call, const Scratch scratch) {
  __shared__ uint32_t bins[kBins];
  bins[threadIdx.x] = 0;
  __syncthreads();
  const Tile tile(call);
  const Selection& selection = call.options.selection;
  const bool ranked = by_rank(selection), inside = tile.columns > 0;
  const int least = ranked ? 1 : max(selection.tau, 1);
  const int width = static_cast<int>(call.target.width), height = static_cast<int>(call.target.height);
  const int64_t pitch = scratch.score_pitch, bytes = 4 * scratch.words;
  const uint16_t* at = scratch.score + tile.row(call, tile.begin) * pitch + tile.x;  // of the row y
  uint8_t* to = reinterpret_cast<uint8_t*>(scratch.candidates) + tile.row(call, tile.begin) * bytes + tile.x / kPacked;
  const auto largest_of = [&](int y, const uint16_t* row) {
    if (!inside || y < 0 || y >= height) return ScoreWords{};
    return largest_around<(kReach > 0 ? kReach : 0)>(row, tile.x > 0, tile.x + kPacked < pitch);
  };
  constexpr int kHeld = kReach >= 0 ? 2 * kReach + 1 : 1;
  ScoreWords held[kHeld];
#pragma unroll
  for (int i = 1; i < kHeld; ++i) held[i] = largest_of(tile.begin - kReach + i - 1, at + (i - 1 - kReach) * pitch);
  unsigned selected = 0;
  for (int y = tile.begin; y < tile.end; ++y, at += pitch, to += bytes) {
    ScoreWords own{}, largest;
    if (inside) own = ScoreWords::load(reinterpret_cast<const uint32_t*>(at));
    if constexpr (kReach > 0) {
#pragma unroll
      for (int i = 1; i < kHeld; ++i) held[i - 1] = held[i];
      held[kHeld - 1] = largest = largest_of(y + kReach, at + kReach * pitch);
#pragma unroll
      for (int i = 0; i < kHeld - 1; ++i) {
#pragma unroll
        for (int word = 0; word < kWords; ++word)
          largest.value[word] = __vmaxu2(largest.value[word], held[i].value[word]);
      }
    }
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
      const auto of = [&](const ScoreWords& from) { return static_cast<int>(from.value[i / 2] >> i % 2 * 16 & 0xffff); };
      const int score = of(own);
      bool candidate = score >= least;
      if constexpr (kReach > 0) candidate = candidate && score == of(largest);
      if constexpr (kReach < 0) {
        const int reach = static_cast<int>(call.options.nms / 2);
        for (int j = max(y - reach, 0); candidate && j <= min(y + reach, height - 1); ++j)
          candidate = largest_around(at + (j - y) * pitch - tile.x, tile.x + i, reach, width) <= score;
      }
      if (candidate) bits |= 1u << i;
    }
    for (unsigned rest = ranked ? bits : 0; rest != 0; rest &= rest - 1) atomicAdd(&bins[at[__ffs(rest) - 1] >> 8], 1u);
    selected += __popc(bits);
    if (tile.x / kPacked < bytes) *to = static_cast<uint8_t>(bits);
  }
  if (!ranked) atomicAdd(&bins[0], selected);
  __syncthreads();
  Histogram& histogram = scratch.histogram[call.options.per_image ? tile.image : 0];
  if (bins[threadIdx.x] != 0) atomicAdd(&histogram.high[threadIdx.x], bins[threadIdx.x]);
}

// Counts of the candidates that share a sought high byte, by their low byte.
__global__ void __launch_bounds__(kThreads) low_bytes_kernel(const Bcl call, const Scratch scratch) {
  __shared__ uint32_t bins[kSoughtBytes][kBins];
  __shared__ __align__(16) int sought[kSoughtBytes + 1];  // the compiler reads 16 bytes at once
  const Tile tile(call);
  Histogram& histogram = scratch.histogram[call.options.per_image ? tile.image : 0];
  for (int i = 0; i < kSoughtBytes; ++i) bins[i][threadIdx.x] = 0;
  if (threadIdx.x < 32) {
    const Sought bytes(histogram, call.options.selection);
    if (threadIdx.x <= kSoughtBytes) sought[threadIdx.x] = bytes.byte(threadIdx.x);
  }
  __syncthreads();
  const int of[kSoughtBytes] = {sought[0], sought[1], sought[2]};
  for (int y = tile.begin; tile.columns > 0 && y < tile.end; ++y) {
    const int64_t row = tile.row(call, y);
    const uint16_t* const scores = scratch.score + row * scratch.score_pitch + tile.x;
    for (unsigned bits = candidates_of(scratch, row, tile); bits != 0; bits &= bits - 1) {
      const int score = scores[__ffs(bits) - 1], high = score >> 8;
#pragma unroll
      for (int i = 0; i < kSoughtBytes; ++i)
        if (high == of[i]) atomicAdd(&bins[i][score & (kBins - 1)], 1u);
    }
  }
  __syncthreads();
  for (int i = 0; i < kSoughtBytes; ++i)
    if (bins[i][threadIdx.x] != 0) atomicAdd(&histogram.low[i][threadIdx.x], bins[i][threadIdx.x]);
}

// At full resolution: mask and boundary term of the selected pixels.
__global__ void __launch_bounds__(kThreads) select_kernel(
    const Bcl call, const Scratch scratch, uint8_t* mask) {
  using Mask = Pack<uint8_t, kPacked>;
  const Tile tile(call);
  const bool ranked = by_rank(call.options.selection), packs = call.target.width % kPacked == 0;
  const int threshold = scratch.factors->threshold[call.options.per_image ? tile.image : 0];
  float sum = 0;
  for (int y = tile.begin; tile.columns > 0 && y < tile.end; ++y) {
    const int64_t row = tile.row(call, y), at = row * call.target.width + tile.x;
    const unsigned bits = candidates_of(scratch, row, tile);
    Mask selected;
#pragma unroll
    for (int i = 0; i < kPacked; ++i) selected.value[i] = bits >> i & 1;
    if (ranked && bits != 0) {
      const Scores scores = scores_of(scratch, row, tile);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) selected.value[i] = scores.value[i] >= threshold ? selected.value[i] : 0;
    }
    if (bits != 0) {
#pragma unroll
      for (int i = 0; i < kPacked; ++i)
        if (selected.value[i] != 0) sum += scratch.term[at + i];
    }
    if (mask && packs) {
      selected.store_to(mask + at);
    } else if (mask) {
#pragma unroll
      for (int i = 0; i < kPacked; ++i)
        if (i < tile.columns) mask[at + i] = selected.value[i];
    }
  }
  write_sum(sum, scratch.boundary + block_number());
}

}  // namespace

int launch_candidates(const Bcl& call, const Scratch& scratch, void* stream) {
  const dim3 grid = tile_grid(call);
  BCM_TRY(cudaMemsetAsync(
      scratch.histogram, 0, scratch.groups * sizeof(Histogram), static_cast<cudaStream_t>(stream)));
  switch (call.options.nms) {
    case 1: BCM_LAUNCH(candidates_kernel<0>, grid, kThreads, 0, stream, call, scratch); break;
    case 3: BCM_LAUNCH(candidates_kernel<1>, grid, kThreads, 0, stream, call, scratch); break;
    case 5: BCM_LAUNCH(candidates_kernel<2>, grid, kThreads, 0, stream, call, scratch); break;
    case 7: BCM_LAUNCH(candidates_kernel<3>, grid, kThreads, 0, stream, call, scratch); break;
    default: BCM_LAUNCH(candidates_kernel<-1>, grid, kThreads, 0, stream, call, scratch); break;
  }
  if (by_rank(call.options.selection)) BCM_LAUNCH(low_bytes_kernel, grid, kThreads, 0, stream, call, scratch);
  return cudaGetLastError();
}

int launch_selection(const Bcl& call, const Scratch& scratch, uint8_t* mask, void* stream) {
  BCM_LAUNCH(select_kernel, tile_grid(call), kThreads, 0, stream, call, scratch, mask);
  return cudaGetLastError();
}

}  // namespace bcmfnet
