// Pixels and blocks of them: labels, cross-entropies, sums in a fixed order.
#pragma once

#include "bcl/rooms_cuda.h"
#include "common/cuda/pack.h"

namespace bcmfnet {
namespace {

constexpr float kInfinity = __builtin_huge_valf();

// 2^x. Exponents are z * log2(e) - shift, rounded once; the shift, log2(e) times the largest z of the pixel, is common
// to all its classes, so that its own rounding cancels.
__device__ inline float exp2_of(float x) {
#ifdef BCM_CUDA_ON_CPU
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
// log2(x), to 2^-22: absolutely where x is between 0.5 and 2, else relatively. 1 / x, to 1 unit in the last place.
__device__ inline float log2_of(float x) {
#ifdef BCM_CUDA_ON_CPU
  return log2f(x);
#else
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
__device__ inline float reciprocal_of(float x) {
#ifdef BCM_CUDA_ON_CPU
  return 1 / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
// x, or 0 where it is below; NaN stays.
__device__ inline float at_least_0(float x) {
#ifdef BCM_CUDA_ON_CPU
  return x < 0 ? 0.0f : x;
#else
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x));
  return result;
#endif
}
// The lesser of two numbers, or NaN where one of them is.
__device__ inline float least_of(float x, float y) {
#ifdef BCM_CUDA_ON_CPU
  return x != x || x < y ? x : y;
#else
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
#endif
}
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
__device__ inline float exponent(float z, float shift) { return fmaf(kLog2E, z, -shift); }

// The labels that a pixel meets; below 0: none.
struct Labels {
  int own, rows, columns;
};

// The three in one word, each as label + 1: Narrow of up to kMostClasses, Wide of more.
template <typename Word, int kBits>
struct Packing {
  static constexpr Word kMask = (Word{1} << kBits) - 1;

  __device__ static Word packed(Word own, Word rows, Word columns) {
    return static_cast<Word>(own | rows << kBits | columns << 2 * kBits);
  }
  __device__ static Labels unpacked(Word word) {
    const int own = word & kMask, rows = word >> kBits & kMask, columns = static_cast<int>(word >> 2 * kBits);
    return {own - 1, rows - 1, columns - 1};
  }
};
using Narrow = Packing<uint16_t, 5>;
using Wide = Packing<uint64_t, 13>;
static_assert(kMostClasses <= Narrow::kMask && kMaxClasses <= Wide::kMask, "a label + 1 must fit its bits");

// Reads labels of one image. With kTerms the call may be binary, and have weights of pixels: one of 0 makes a label one
// that is ignored.
template <bool kTerms>
struct TargetOf {
  const Bcl& call;
  const int image;

  __device__ float weight(int y, int x) const {
    const View& weights = call.pixel_weight;
    if (weights.data == nullptr) return 1.0f;
    return static_cast<const float*>(weights.data)[offset_of(weights, image, 0, y, x)];
  }
  __device__ int64_t read(int y, int x) const {
    if (kTerms && weight(y, x) == 0) return call.options.ignore_index;
    const View& target = call.target;
    const int64_t at = image * target.batch_stride + y * target.row_stride + x * target.column_stride;
    switch (target.dtype) {
      case DType::kUInt8: return static_cast<const uint8_t*>(target.data)[at];
      case DType::kInt16: return static_cast<const int16_t*>(target.data)[at];
      case DType::kInt32: return static_cast<const int32_t*>(target.data)[at];
      default: return static_cast<const int64_t*>(target.data)[at];
    }
  }
  __device__ int known(int64_t label) const {
    const bool counts = label != call.options.ignore_index && label >= 0 &&
                        label < (kTerms ? classes_of(call) : call.logits.channels);
    return counts ? static_cast<int>(label) : -1;
  }
  // The row or column that the flip reads.
  __device__ int flip(int axis, int position) const {
    const BclOptions& options = call.options;
    const int length = static_cast<int>(axis == 0 ? call.target.height : call.target.width);
    return flipped<int>(position, length, static_cast<int>(options.step[axis]),
                        static_cast<int>(options.offset[axis]), options.mirror);
  }
  // The labels that the boundary term of a pixel needs.
  __device__ Labels of_term(int y, int x) const {
    const float* terms = call.options.terms;
    const int own = known(read(y, x));
    if (own < 0 || !selects(call)) return {own, -1, -1};
    return {own, terms[1] != 0 ? known(read(flip(0, y), x)) : -1, terms[2] != 0 ? known(read(y, flip(1, x))) : -1};
  }
};
using Target = TargetOf<false>;

__device__ inline float class_weight_of(const Bcl& call, int label) {
  return call.class_weight ? call.class_weight[label] : 1.0f;
}

// The cross-entropies of a pixel with a label; `of(label)` is that of one label.
struct CrossEntropies {
  float own, rows, columns;

  CrossEntropies() = default;

  template <typename Of>
  __device__ CrossEntropies(const Labels& labels, Of of)
      : own(of(labels.own)), rows(labels.rows < 0 ? 0.0f : of(labels.rows)),
        columns(labels.columns < 0 ? 0.0f : of(labels.columns)) {}

  // Without a branch: `of` is called with absent labels too.
  template <typename Of>
  __device__ static CrossEntropies of_all(const Labels& labels, Of of) {
    CrossEntropies result;
    result.own = of(labels.own), result.rows = of(labels.rows), result.columns = of(labels.columns);
    result.rows = labels.rows < 0 ? 0.0f : result.rows, result.columns = labels.columns < 0 ? 0.0f : result.columns;
    return result;
  }

  __device__ float sum(const float* coefficients) const { return weighted(coefficients, own, rows, columns); }
};

// Nats to a step of the logarithm to base 2; none of one class, whose cross-entropy is exactly 0.
__device__ inline float nats_of(int64_t classes) { return classes == 1 ? 0.0f : kLn2; }

// The cross-entropy of a label from its exponent and the logarithm of the sum to base 2.
__device__ inline float cross_entropy(float nats, float log_sum, float exponent_of_label) {
  return at_least_0(nats * (log_sum - exponent_of_label));  // below is a rounding
}

// What a pixel with a weight adds to a sum: nothing where the weight is 0, whatever the loss is.
__device__ inline float times_weight(float weight, float loss) { return weight != 0 ? weight * loss : 0.0f; }

// A value that all threads of a warp have, computed once: without the exchange the compiler would rather compute it again
// wherever a loop asks for it.
template <typename T>
__device__ T once(T value) {
  return static_cast<T>(__shfl_sync(kFullWarp, value, 0));
}

template <typename T>
__device__ T sum_of_warp(T value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullWarp, value, lanes);
  return value;
}

// The sum over a block, at its first thread. `shared` holds a value for each warp and is free when this is called.
template <typename T>
__device__ T sum_of_block(T value, T* shared) {
  value = sum_of_warp(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  T sum{};
  if (threadIdx.x == 0)
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += shared[warp];
  __syncthreads();
  return sum;
}

__device__ inline unsigned flags_of_block(unsigned flags) {
  const bool nan = __syncthreads_or(flags & kNan), wrong = __syncthreads_or(flags & kWrong);
  return (nan ? kNan : 0) | (wrong ? kWrong : 0);
}

// What the blocks of `labels` know, and those of `score`.
__device__ inline void write_labelled(double weight, int valid, unsigned flags, Partial* to) {
  __shared__ double doubles[kThreads / 32];
  __shared__ int integers[kThreads / 32];
  weight = sum_of_block(weight, doubles), valid = sum_of_block(valid, integers);
  flags = flags_of_block(flags);
  if (threadIdx.x == 0) *to = {weight, 0, valid, flags};
}

__device__ inline void write_scored(double ce, unsigned flags, Partial* to) {
  __shared__ double doubles[kThreads / 32];
  ce = sum_of_block(ce, doubles);
  flags = flags_of_block(flags);
  if (threadIdx.x == 0) *to = {0, ce, 0, flags};
}

__device__ inline void write_sum(float sum, double* to) {
  __shared__ double doubles[kThreads / 32];
  const double total = sum_of_block(static_cast<double>(sum), doubles);
  if (threadIdx.x == 0) *to = total;
}

__device__ inline int64_t block_number() { return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x; }

// The rows that a block of pixels covers, and a thread's column.
struct Patch {
  int image;
  int begin, end, x;
  bool inside;

  __device__ explicit Patch(const Bcl& call) {
    const unsigned groups = static_cast<unsigned>(ceil_div(call.target.height, kRows));
    const int height = static_cast<int>(call.target.height);
    image = static_cast<int>(blockIdx.x / groups);
    begin = static_cast<int>(blockIdx.x % groups) * kRows;
    end = begin + kRows < height ? begin + kRows : height;
    x = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
    inside = x < call.target.width;
  }
};

// The pixels of a tile that a thread has: rows of its warp, neighbouring columns of its own.
struct Tile {
  int image, top, left;        // of the block
  int begin, end, x, columns;  // of the thread; none of its columns may be inside

  __device__ explicit Tile(const Bcl& call) {
    const unsigned groups = static_cast<unsigned>(ceil_div(call.target.height, kTileRows));
    const int height = static_cast<int>(call.target.height), width = static_cast<int>(call.target.width);
    image = static_cast<int>(blockIdx.x / groups);
    top = static_cast<int>(blockIdx.x % groups) * kTileRows, left = static_cast<int>(blockIdx.y) * kTileColumns;
    begin = top + static_cast<int>(threadIdx.x / 32) * kRows, end = min(begin + kRows, height);
    x = left + static_cast<int>(threadIdx.x % 32) * kPacked, columns = min(max(width - x, 0), kPacked);
  }
  // Of a row, over all images.
  __device__ int64_t row(const Bcl& call, int y) const { return image * call.target.height + y; }
};

// Steps of the grid of scores, cut to an integer; a conversion makes 0 of NaN, and the largest of what is beyond.
__device__ inline uint16_t cut_to_grid(float steps) {
#ifdef BCM_CUDA_ON_CPU
  return isnan(steps) ? 0 : static_cast<uint16_t>(fminf(steps, kMaxScore));
#else
  return static_cast<uint16_t>(min(__float2uint_rz(steps), static_cast<unsigned>(kMaxScore)));
#endif
}
// on_grid, to an integer.
__device__ inline uint16_t on_grid_of(float score) { return cut_to_grid(fmaf(score, kScoreUnit, 0.5f)); }

// The candidates among the columns of a thread of a tile, as bits.
__device__ inline unsigned candidates_of(const Scratch& scratch, int64_t row, const Tile& tile) {
  return reinterpret_cast<const uint8_t*>(scratch.candidates + row * scratch.words)[tile.x / kPacked];
}
using Scores = Pack<uint16_t, kPacked>;
__device__ inline Scores scores_of(const Scratch& scratch, int64_t row, const Tile& tile) {
  return Scores::load(scratch.score + row * scratch.score_pitch + tile.x);
}

// Whether a pixel is a candidate, and its score if it is; else -1.
__device__ inline int score_of_candidate(const Scratch& scratch, int64_t row, int x) {
  const bool candidate = scratch.candidates[row * scratch.words + x / 32] >> (x % 32) & 1;
  return candidate ? scratch.score[row * scratch.score_pitch + x] : -1;
}

__device__ inline bool is_selected(const Bcl& call, const Scratch& scratch, int64_t image, int y, int x) {
  if (!selects(call)) return false;
  const int threshold = scratch.factors->threshold[call.options.per_image ? image : 0];
  const int score = score_of_candidate(scratch, image * call.target.height + y, x);
  return score >= 0 && score >= threshold;
}

// What the gradient of a pixel takes from each of its labels; `ce` and `boundary` are the factors of the two terms.
__device__ inline Amounts<float> amounts_of(
    const Bcl& call, const Labels& labels, bool selected, float ce, float boundary) {
  const float weight = class_weight_of(call, labels.own);
  return bcmfnet::amounts_of(
      call.options.terms, ce != 0 ? weight * ce : 0.0f, selected ? weight * boundary : 0.0f, labels.rows >= 0,
      labels.columns >= 0);
}

// max z of a pixel and the sum of its exponentials, K classes in registers at a time: the online softmax of Milakov and
// Gimelshein (arXiv 1805.02867, 2018), whose sum is rescaled whenever a larger logit turns up.
template <int K>
struct Softmax {
  float best = -kInfinity, shift = 0, sum = 0;

  template <typename Logits>
  __device__ Softmax(const Logits& logits, int classes) {
    for (int first = 0; first < classes; first += K) {
      float z[K];
      logits.template read<K>(first, classes, z);
#pragma unroll
      for (int i = 0; i < K; ++i) best = fmaxf(best, z[i]);
      const float before = shift;
      shift = shift_of(best);
      if (sum != 0) sum *= exp2_of(before - shift);
#pragma unroll
      for (int i = 0; i < K; ++i) sum += exp2_of(exponent(z[i], shift));
    }
  }
  // Without a finite logit none: -inf - -inf is not a number.
  __device__ static float shift_of(float best) { return best == -kInfinity ? 0.0f : kLog2E * best; }
};

// The cross-entropy and the score of each pixel.
template <typename Logits, int K>
__global__ void __launch_bounds__(kThreads, K <= 19 ? 2 : 1) score_pixels_kernel(
    const Bcl call, const Scratch scratch) {
  const Patch patch(call);
  const float nats = nats_of(call.logits.channels);
  float ces = 0;
  unsigned flags = 0;
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t row = patch.image * call.target.height + y, at = row * call.target.width + patch.x;
    const int64_t at_score = row * scratch.score_pitch + patch.x;
    const Labels labels =
        is_wide(call) ? Wide::unpacked(scratch.labels[at_score]) : Narrow::unpacked(scratch.score[at_score]);
    uint16_t score = 0;
    float term = 0, lse = 0, best = 0;
    if (labels.own >= 0) {
      const Logits logits(call, patch.image, y, patch.x);
      const Softmax<K> softmax(logits, static_cast<int>(call.logits.channels));
      const float log_sum = log2f(softmax.sum), weight = class_weight_of(call, labels.own);
      const CrossEntropies ce(labels, [&](int label) {
        return cross_entropy(nats, log_sum, exponent(logits(label), softmax.shift));
      });
      const float s = ce.sum(call.options.score);
      best = softmax.best, lse = kLn2 * log_sum;
      ces += times_weight(weight, ce.own);
      flags |= isnan(s) ? kNan : 0;
      score = on_grid_of(s), term = times_weight(weight, ce.sum(call.options.terms));
    }
    if (scratch.best) scratch.best[at] = best;
    if (scratch.lse) scratch.lse[at] = lse;
    if (!selects(call)) continue;
    scratch.score[at_score] = score;
    if (scratch.term) scratch.term[at] = term;
  }
  write_scored(ces, flags, scratch.scored + block_number());
}

}  // namespace
}  // namespace bcmfnet
