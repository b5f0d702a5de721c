// The loss on a GPU, as a sequence of kernels without a wait:
//
//   labels      the three labels of each pixel, in one word
//   score       the cross-entropy and the score of each pixel; with upsampling also the gradient of the cross-entropy,
//               up to its factor
//   candidates  non-maximum suppression, to one bit for each pixel; counts of scores by their high byte
//   low_bytes   counts of the scores that share a sought high byte, by their low byte
//   resolve     thresholds, counts and factors
//   select      at full resolution: mask and boundary term of the selected pixels
//   cells       with upsampling: boundary term of the selected pixels, and their gradient
//   gather      with upsampling: the cells' gradients to the low-resolution logits
//   finish      the loss
//
// A block adds what its threads found in a fixed order and writes it where no other does, so that every run gives the
// same bits. Atomics count integers alone.
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bcl/bcl_cuda.h"
#include "bcl/bcl_math.h"
#include "common/bilinear.h"
#include "common/launch.h"
#include "common/select_cuda.h"

namespace bcmfnet {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr int kThreads = 256;   // of a block, but for the cells; columns that it covers
constexpr int kRows = 8;        // rows that a block covers
constexpr int kWarps = 4;       // of a block of cells: output rows in hand
constexpr int kCells = 32;      // of a block of cells: one for each lane
constexpr int kNodes = kCells + 1;
constexpr int kMostClasses = 31;  // that a thread holds in registers, and whose labels fit 5 bits

// What a block of pixels or cells adds up.
struct Partial {
  double weight, ce;
  int64_t valid;
  unsigned flags;
};
constexpr unsigned kNan = 1;    // a score is NaN
constexpr unsigned kWrong = 2;  // a label is neither a class nor ignore_index, or its class weight is not finite

// What the pixels' gradient waits for.
struct Factors {
  double inverse[2];  // of the sum of the weights, of the divisor of the boundary term
  double ce;
  int64_t selected;
  float hard;   // of the selected pixels' gradient, next to that of the cross-entropy
  float scale;  // of both
  unsigned flags;
  int threshold[1];  // of each histogram
};

// Device memory of one forward. Maps have the target's shape.
struct Scratch {
  float* logits;         // low-resolution logits as float32, contiguous, where they are not float32
  uint16_t* score;       // rows of score_pitch; of up to kMostClasses, the labels before the score is written
  uint64_t* labels;      // rows of score_pitch; of more than kMostClasses
  uint32_t* candidates;  // rows of `words`, a bit for each pixel
  float* term;           // of the boundary term, weighted; at full resolution
  float *best, *lse;     // max z, log sum exp(z - max z); with upsampling from more than kMostClasses
  Histogram* histogram;  // for the batch or for each image
  Partial *labelled, *scored;  // of the blocks of `labels` and of `score`
  double* hard;          // boundary terms, of the blocks of `select` or `cells`
  float *upper, *lower;  // [units, segments, classes, kNodes]: gradients of the source rows around a row of cells
  Factors* factors;
  int64_t score_pitch, words, groups, labelled_blocks, scored_blocks, hard_blocks;
};

__host__ __device__ inline bool upsampled(const Bcl& call) {
  return call.in_height != call.out_height || call.in_width != call.out_width;
}
__host__ __device__ inline int64_t blocks_of(int64_t count, int64_t each) { return (count + each - 1) / each; }
__host__ __device__ inline bool selects(const Bcl& call) { return call.options.boundary_weight != 0; }
__host__ __device__ inline bool is_wide(const Bcl& call) { return call.classes > kMostClasses; }

// Pieces of one allocation.
struct Arena {
  char* base;
  int64_t bytes = 0;

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + bytes);
    bytes += blocks_of(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return piece;
  }
};

int64_t segments_of(const Bcl& call) { return blocks_of(call.in_width, kCells); }
int64_t units_of(const Bcl& call) { return call.batch * call.in_height; }
dim3 pixel_grid(const Bcl& call) {
  return dim3(static_cast<unsigned>(call.batch * blocks_of(call.out_height, kRows)),
              static_cast<unsigned>(blocks_of(call.out_width, kThreads)));
}
dim3 cell_grid(const Bcl& call) {
  const int64_t groups = is_wide(call) ? blocks_of(call.classes, kMostClasses) : 1;
  return dim3(static_cast<unsigned>(units_of(call)), static_cast<unsigned>(segments_of(call)),
              static_cast<unsigned>(groups));
}
int64_t count(dim3 grid) { return static_cast<int64_t>(grid.x) * grid.y; }  // classes aside

Scratch lay_out(const Bcl& call, bool saves, Arena& arena) {
  Scratch scratch{};
  const bool up = upsampled(call), wide = is_wide(call);
  const int64_t rows = call.batch * call.out_height, pixels = rows * call.out_width;
  scratch.groups = call.options.per_image ? call.batch : 1;
  scratch.labelled_blocks = count(pixel_grid(call));
  scratch.scored_blocks = count(up && !wide ? cell_grid(call) : pixel_grid(call));
  scratch.hard_blocks = count(up ? cell_grid(call) : pixel_grid(call));
  if (up && call.logits_type != DType::kFloat32)
    scratch.logits = arena.take<float>(units_of(call) * call.classes * call.in_width);
  scratch.score_pitch = blocks_of(call.out_width, 2) * 2;
  scratch.words = blocks_of(call.out_width, 32);
  if (selects(call) || !wide) scratch.score = arena.take<uint16_t>(rows * scratch.score_pitch);
  if (wide) scratch.labels = arena.take<uint64_t>(rows * scratch.score_pitch);
  if (selects(call)) {
    scratch.candidates = arena.take<uint32_t>(rows * scratch.words);
    scratch.histogram = arena.take<Histogram>(scratch.groups);
    scratch.hard = arena.take<double>(scratch.hard_blocks);
    if (!up) scratch.term = arena.take<float>(pixels);
  }
  if (up && wide) scratch.best = arena.take<float>(pixels), scratch.lse = arena.take<float>(pixels);
  if (up && saves) {
    const int64_t nodes = units_of(call) * segments_of(call) * call.classes * kNodes;
    scratch.upper = arena.take<float>(nodes), scratch.lower = arena.take<float>(nodes);
  }
  scratch.labelled = arena.take<Partial>(scratch.labelled_blocks);
  scratch.scored = arena.take<Partial>(scratch.scored_blocks);
  scratch.factors = reinterpret_cast<Factors*>(arena.take<char>(sizeof(Factors) + 4 * scratch.groups));
  return scratch;
}

// ---- Pixels

__device__ float as_float(float value) { return value; }
__device__ float as_float(__half value) { return __half2float(value); }
__device__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ void store(float* to, float value) { *to = value; }
__device__ void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// 2^x. Exponents are z * log2(e) - shift, rounded once; the shift, log2(e) times the largest z of the pixel, is common
// to all its classes, so that its own rounding cancels.
__device__ float exp2_of(float x) {
#ifdef BCM_CUDA_ON_CPU
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
__device__ float exponent(float z, float shift) { return fmaf(kLog2E, z, -shift); }

// The labels that a pixel meets; below 0: none.
struct Labels {
  int own, rows, columns;
};

// In one word, each as label + 1: Narrow of up to kMostClasses, Wide of more.
template <typename Word, int kBits>
struct Packing {
  static constexpr Word kMask = (Word{1} << kBits) - 1;

  __device__ static Word packed(const Labels& labels) {
    const Word own = labels.own + 1, rows = labels.rows + 1, columns = labels.columns + 1;
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

// Reads labels of one image.
struct Target {
  const Bcl& call;
  const int image;

  __device__ int64_t read(int y, int x) const {
    const int64_t at = image * call.target_stride[0] + y * call.target_stride[1] + x * call.target_stride[2];
    switch (call.target_type) {
      case DType::kUInt8: return static_cast<const uint8_t*>(call.target)[at];
      case DType::kInt16: return static_cast<const int16_t*>(call.target)[at];
      case DType::kInt32: return static_cast<const int32_t*>(call.target)[at];
      default: return static_cast<const int64_t*>(call.target)[at];
    }
  }
  __device__ int known(int64_t label) const {
    const bool counts = label != call.options.ignore_index && label >= 0 && label < call.classes;
    return counts ? static_cast<int>(label) : -1;
  }
  // The row or column that the flip reads.
  __device__ int flip(int axis, int position) const {
    const BclOptions& options = call.options;
    const int length = static_cast<int>(axis == 0 ? call.out_height : call.out_width);
    return flipped<int>(position, length, static_cast<int>(options.step[axis]),
                        static_cast<int>(options.offset[axis]), options.mirror);
  }
  // Those that the boundary term of a pixel needs.
  __device__ Labels of_term(int y, int x) const {
    const float* terms = call.options.terms;
    const int own = known(read(y, x));
    if (own < 0 || !selects(call)) return {own, -1, -1};
    return {own, terms[1] != 0 ? known(read(flip(0, y), x)) : -1, terms[2] != 0 ? known(read(y, flip(1, x))) : -1};
  }
};

__device__ float weight_of(const Bcl& call, int label) { return call.weight ? call.weight[label] : 1.0f; }

// The cross-entropies of a pixel with a label; `of(label)` is that of one label.
struct CrossEntropies {
  float own, rows, columns;

  template <typename Of>
  __device__ CrossEntropies(const Labels& labels, Of of)
      : own(of(labels.own)), rows(labels.rows < 0 ? 0.0f : of(labels.rows)),
        columns(labels.columns < 0 ? 0.0f : of(labels.columns)) {}

  __device__ float sum(const float* coefficients) const { return weighted(coefficients, own, rows, columns); }
};

// The cross-entropy of a label from its exponent and the logarithm of the sum to base 2. Of one class it is exactly 0.
__device__ float cross_entropy(const Bcl& call, float log_sum, float exponent_of_label) {
  const float ce = (call.classes == 1 ? 0.0f : kLn2) * (log_sum - exponent_of_label);
  return ce < 0 ? 0.0f : ce;  // a rounding
}

// What a pixel with a weight adds to a sum: nothing where the weight is 0, whatever the loss is.
__device__ float times_weight(float weight, float loss) { return weight != 0 ? weight * loss : 0.0f; }

template <typename T>
__device__ T sum_of_warp(T value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kWarp, value, lanes);
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

__device__ unsigned flags_of_block(unsigned flags) {
  const bool nan = __syncthreads_or(flags & kNan), wrong = __syncthreads_or(flags & kWrong);
  return (nan ? kNan : 0) | (wrong ? kWrong : 0);
}

__device__ void write_partial(double weight, double ce, int valid, unsigned flags, Partial* to) {
  __shared__ double doubles[kThreads / 32];
  __shared__ int64_t integers[kThreads / 32];
  weight = sum_of_block(weight, doubles), ce = sum_of_block(ce, doubles);
  const int64_t sum = sum_of_block(static_cast<int64_t>(valid), integers);
  flags = flags_of_block(flags);
  if (threadIdx.x == 0) *to = {weight, ce, sum, flags};
}

__device__ void write_sum(float sum, double* to) {
  __shared__ double doubles[kThreads / 32];
  const double total = sum_of_block(static_cast<double>(sum), doubles);
  if (threadIdx.x == 0) *to = total;
}

__device__ int64_t block_number() { return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x; }

// The rows that a block of pixels covers, and a thread's column.
struct Patch {
  int image;
  int begin, end, x;
  bool inside;

  __device__ explicit Patch(const Bcl& call) {
    const unsigned groups = static_cast<unsigned>(blocks_of(call.out_height, kRows));
    const int height = static_cast<int>(call.out_height);
    image = static_cast<int>(blockIdx.x / groups);
    begin = static_cast<int>(blockIdx.x % groups) * kRows;
    end = begin + kRows < height ? begin + kRows : height;
    x = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
    inside = x < call.out_width;
  }
};

__device__ uint16_t on_grid_of(float score) { return static_cast<uint16_t>(on_grid(score)); }

// Logits of a pixel at full resolution.
template <typename T>
struct Full {
  const T* at;
  int64_t stride;

  __device__ Full(const Bcl& call, int64_t image, int y, int x)
      : at(static_cast<const T*>(call.logits) + image * call.logits_stride[0] + y * call.logits_stride[2] +
           x * call.logits_stride[3]),
        stride(call.logits_stride[1]) {}
  __device__ float operator()(int64_t c) const { return as_float(at[c * stride]); }
  // K classes from `first` on, -inf beyond the last one.
  template <int K>
  __device__ void read(int first, int classes, float* z) const {
    const T* from = at + first * stride;
#pragma unroll
    for (int i = 0; i < K; ++i, from += stride) z[i] = first + i < classes ? as_float(*from) : -kInfinity;
  }
};

// Logits between four source pixels.
struct Lerped {
  const float *top, *bottom;
  int64_t right, stride;
  float across, down;

  __device__ Lerped(const Bcl& call, int64_t image, int y, int x)
      : Lerped(call, image, source_of(y, call.in_height, call.out_height),
               source_of(x, call.in_width, call.out_width)) {}
  __device__ Lerped(const Bcl& call, int64_t image, const Source& row, const Source& column)
      : stride(call.logits_stride[1]), across(column.share), down(row.share) {
    const int64_t* strides = call.logits_stride;
    top = static_cast<const float*>(call.logits) + image * strides[0] + row.low * strides[2] + column.low * strides[3];
    bottom = top + (row.high - row.low) * strides[2];
    right = (column.high - column.low) * strides[3];
  }
  __device__ float column(int64_t at) const { return fmaf(down, bottom[at] - top[at], top[at]); }
  __device__ float left(int64_t c) const { return column(c * stride); }
  __device__ float to_right(int64_t c) const { return column(c * stride + right) - left(c); }
  __device__ float operator()(int64_t c) const { return fmaf(across, to_right(c), left(c)); }
  template <int K>
  __device__ void read(int first, int classes, float* z) const {
#pragma unroll 4
    for (int i = 0; i < K; ++i) z[i] = first + i < classes ? (*this)(first + i) : -kInfinity;
  }
};

// max z of a pixel, and the sum of its exponentials, K classes in registers at a time.
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

__global__ void __launch_bounds__(kThreads, 4) labels_kernel(const Bcl call, const Scratch scratch) {
  const Patch patch(call);
  const Target target{call, patch.image};
  const BclOptions& options = call.options;
  const bool needs_rows = selects(call) && (options.score[1] != 0 || options.terms[1] != 0);
  const bool needs_columns = selects(call) && (options.score[2] != 0 || options.terms[2] != 0);
  const int other_x = patch.inside ? target.flip(1, patch.x) : 0;
  float weight = 0;
  int valid = 0;
  unsigned flags = 0;
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t label = target.read(y, patch.x);
    const bool counts = label != options.ignore_index;
    Labels labels{target.known(label), -1, -1};
    valid += counts, flags |= counts && labels.own < 0 ? kWrong : 0;
    if (labels.own >= 0) {
      weight += weight_of(call, labels.own);
      if (needs_rows) labels.rows = target.known(target.read(target.flip(0, y), patch.x));
      if (needs_columns) labels.columns = target.known(target.read(y, other_x));
    }
    const int64_t at = (patch.image * call.out_height + y) * scratch.score_pitch + patch.x;
    if (is_wide(call)) {
      scratch.labels[at] = Wide::packed(labels);
    } else {
      scratch.score[at] = Narrow::packed(labels);
    }
  }
  write_partial(weight, 0, valid, flags, scratch.labelled + block_number());
}

template <typename Logits, int K>
__global__ void __launch_bounds__(kThreads, K <= 19 ? 2 : 1) score_pixels_kernel(
    const Bcl call, const Scratch scratch) {
  const Patch patch(call);
  float ces = 0;
  unsigned flags = 0;
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t row = patch.image * call.out_height + y, at = row * call.out_width + patch.x;
    const int64_t at_score = row * scratch.score_pitch + patch.x;
    const Labels labels =
        is_wide(call) ? Wide::unpacked(scratch.labels[at_score]) : Narrow::unpacked(scratch.score[at_score]);
    uint16_t score = 0;
    float term = 0, lse = 0, best = 0;
    if (labels.own >= 0) {
      const Logits logits(call, patch.image, y, patch.x);
      const Softmax<K> softmax(logits, static_cast<int>(call.classes));
      const float log_sum = log2f(softmax.sum), weight = weight_of(call, labels.own);
      const CrossEntropies ce(labels, [&](int label) {
        return cross_entropy(call, log_sum, exponent(logits(label), softmax.shift));
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
  write_partial(0, ces, 0, flags, scratch.scored + block_number());
}

// ---- Selection

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
  const int width = static_cast<int>(call.out_width), height = static_cast<int>(call.out_height);
  const int reach = kReach >= 0 ? kReach : static_cast<int>(call.options.nms / 2);
  const uint16_t* scores = scratch.score + patch.image * call.out_height * scratch.score_pitch;
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
    const unsigned word = __ballot_sync(kWarp, candidate);
    const int64_t row = patch.image * call.out_height + y;
    if (patch.inside && threadIdx.x % 32 == 0) scratch.candidates[row * scratch.words + patch.x / 32] = word;
    count_bins(bins, candidate, score >> 8);
  }
  __syncthreads();
  Histogram& histogram = scratch.histogram[call.options.per_image ? patch.image : 0];
  if (bins[threadIdx.x] != 0) atomicAdd(&histogram.high[threadIdx.x], bins[threadIdx.x]);
}

__device__ int score_of_candidate(const Scratch& scratch, int64_t row, int x) {
  const bool candidate = scratch.candidates[row * scratch.words + x / 32] >> (x % 32) & 1;
  return candidate ? scratch.score[row * scratch.score_pitch + x] : -1;
}

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
    const int score = patch.inside ? score_of_candidate(scratch, patch.image * call.out_height + y, patch.x) : -1;
    for (int i = 0; i < kSoughtBytes; ++i)
      count_bins(bins[i], score >= 0 && score >> 8 == sought[i], score & (kBins - 1));
  }
  __syncthreads();
  for (int i = 0; i < kSoughtBytes; ++i)
    if (bins[i][threadIdx.x] != 0) atomicAdd(&histogram.low[i][threadIdx.x], bins[i][threadIdx.x]);
}

// One block: thresholds by its warps, sums of all blocks of `score`, and the factors that follow.
__global__ void __launch_bounds__(kThreads, 1) resolve_kernel(
    const Bcl call, const Scratch scratch, const BclOutputs outputs) {
  __shared__ double doubles[kThreads / 32];
  __shared__ int64_t integers[kThreads / 32];
  Factors& factors = *scratch.factors;
  const BclOptions& options = call.options;
  int64_t selected = 0;
  for (int64_t group = threadIdx.x / 32; group < scratch.groups; group += kThreads / 32) {
    int score = options.selection.tau;
    if (selects(call)) {
      const Threshold threshold(scratch.histogram[group], options.selection);
      score = threshold.score;
      selected += threadIdx.x % 32 == 0 ? threshold.selected : 0;
    }
    if (threadIdx.x % 32 == 0) factors.threshold[group] = outputs.threshold[group] = score;
  }
  selected = sum_of_block(selected, integers);
  Partial sum{};
  const auto add = [&](const Partial* parts, int64_t blocks) {
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
      sum.weight += parts[i].weight, sum.ce += parts[i].ce, sum.valid += parts[i].valid;
      sum.flags |= parts[i].flags;
    }
  };
  add(scratch.labelled, scratch.labelled_blocks);
  add(scratch.scored, scratch.scored_blocks);
  const double weight = sum_of_block(sum.weight, doubles), ce = sum_of_block(sum.ce, doubles);
  const int64_t valid = sum_of_block(sum.valid, integers);
  unsigned flags = flags_of_block(sum.flags);
  if (threadIdx.x != 0) return;
  if (!isfinite(weight)) flags |= kWrong;
  const double divisor = static_cast<double>(options.by_valid ? valid : selected);
  double inverse[2] = {weight > 0 ? 1 / weight : 1, divisor > 0 ? 1 / divisor : 1};
  if (flags & kWrong) inverse[0] = inverse[1] = nanf("");  // nobody shall train on
  const double of_ce = options.ce_weight * inverse[0], of_hard = options.boundary_weight * inverse[1];
  factors.inverse[0] = inverse[0], factors.inverse[1] = inverse[1];
  factors.ce = ce * inverse[0], factors.selected = selected;
  factors.scale = static_cast<float>(options.ce_weight != 0 ? of_ce : of_hard);
  factors.hard = static_cast<float>(options.ce_weight != 0 ? of_hard / of_ce : 1);
  factors.flags = flags;
  *outputs.ce = static_cast<float>(factors.ce);
  *outputs.selected = selected, *outputs.valid = valid;
  if (outputs.scales) outputs.scales[0] = static_cast<float>(inverse[0]);
  if (outputs.scales) outputs.scales[1] = static_cast<float>(inverse[1]);
}

__device__ bool is_selected(const Bcl& call, const Scratch& scratch, int64_t image, int y, int x) {
  if (!selects(call)) return false;
  const int threshold = scratch.factors->threshold[call.options.per_image ? image : 0];
  const int score = score_of_candidate(scratch, image * call.out_height + y, x);
  return score >= 0 && score >= threshold;
}

__global__ void __launch_bounds__(kThreads) select_kernel(
    const Bcl call, const Scratch scratch, const BclOutputs outputs) {
  const Patch patch(call);
  float sum = 0;
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t at = (patch.image * call.out_height + y) * call.out_width + patch.x;
    const bool selected = is_selected(call, scratch, patch.image, y, patch.x);
    if (outputs.mask) outputs.mask[at] = selected;
    if (selected) sum += scratch.term[at];
  }
  write_sum(sum, scratch.hard + block_number());
}

__global__ void __launch_bounds__(kThreads) finish_kernel(
    const Bcl call, const Scratch scratch, const BclOutputs outputs) {
  __shared__ double doubles[kThreads / 32];
  const Factors& factors = *scratch.factors;
  double sum = 0;
  for (int64_t i = threadIdx.x; selects(call) && i < scratch.hard_blocks; i += kThreads) sum += scratch.hard[i];
  sum = sum_of_block(sum, doubles);
  if (threadIdx.x != 0) return;
  const double hard = (factors.flags & kNan) && selects(call) ? nanf("") : sum * factors.inverse[1];
  *outputs.boundary = static_cast<float>(hard);
  const double ce_weight = call.options.ce_weight, boundary_weight = call.options.boundary_weight;
  const double of_ce = ce_weight != 0 ? ce_weight * factors.ce : 0;
  const double loss = of_ce + (boundary_weight != 0 ? boundary_weight * hard : 0);
  *outputs.loss = static_cast<float>(factors.flags & kWrong ? nanf("") : loss);
}

// ---- Gradient

// What the gradient of a pixel takes from each of its labels; `of_ce` and `of_hard` are factors of the two terms.
__device__ Amounts<float> amounts_of(
    const Bcl& call, const Labels& labels, bool selected, float of_ce, float of_hard) {
  const BclOptions& options = call.options;
  const float w = weight_of(call, labels.own), hard = selected ? w * of_hard : 0.0f;
  Amounts<float> result;
  result.own = (of_ce != 0 ? w * of_ce : 0.0f) + options.terms[0] * hard;
  result.rows = labels.rows >= 0 ? options.terms[1] * hard : 0.0f;
  result.columns = labels.columns >= 0 ? options.terms[2] * hard : 0.0f;
  result.total = result.own + result.rows + result.columns;
  return result;
}

// A thread reads all logits of its pixel before it writes: the gradient may take their place. The softmax of all
// classes is written first, then the few that are labels.
template <typename T, int K>
__global__ void __launch_bounds__(kThreads, K <= 19 ? 2 : 1) gradient_kernel(
    const Bcl call, const float* grad, const float* lse, const uint8_t* mask, const float* scales, T* gradient,
    const int64_t stride_n, const int64_t stride_c, const int64_t stride_h, const int64_t stride_w) {
  const Patch patch(call);
  const Target target{call, patch.image};
  const int classes = static_cast<int>(call.classes);
  const float factor = *grad;
  const float of_ce = call.options.ce_weight * scales[0], of_hard = call.options.boundary_weight * scales[1];
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t at = (patch.image * call.out_height + y) * call.out_width + patch.x;
    T* const to = gradient + patch.image * stride_n + y * stride_h + patch.x * stride_w;
    const Labels labels = target.of_term(y, patch.x);
    Amounts<float> amounts{};
    if (labels.own >= 0) amounts = amounts_of(call, labels, mask[at], of_ce, of_hard);
    const Full<T> logits(call, patch.image, y, patch.x);
    const bool counts = amounts.total != 0 && classes > 1;
    float z[K], best = -kInfinity;
    logits.template read<K>(0, classes, z);
#pragma unroll
    for (int i = 0; i < K; ++i) best = fmaxf(best, z[i]);
    for (int c = K; c < classes; ++c) best = fmaxf(best, logits(c));
    const float shift = Softmax<K>::shift_of(best), share = amounts.total * exp2_of(-kLog2E * lse[at]);
    const auto of_label = [&](int label) {
      float g = share * exp2_of(exponent(logits(label), shift)) - amounts.own * (label == labels.own);
      g -= amounts.rows * (label == labels.rows) + amounts.columns * (label == labels.columns);
      return factor * g;
    };
    const bool has_rows = counts && amounts.rows != 0, has_columns = counts && amounts.columns != 0;
    const float own = counts ? of_label(labels.own) : 0.0f, rows = has_rows ? of_label(labels.rows) : 0.0f;
    const float columns = has_columns ? of_label(labels.columns) : 0.0f;
    for (int first = 0; first < classes; first += K) {
      if (first > 0) logits.template read<K>(first, classes, z);
      T* next = to + first * stride_c;
#pragma unroll
      for (int i = 0; i < K; ++i, next += stride_c) {
        const float g = factor * (share * exp2_of(exponent(z[i], shift)));
        if (first + i < classes) store(next, counts ? g : 0.0f);
      }
    }
    if (counts) store(to + labels.own * stride_c, own);
    if (has_rows) store(to + labels.rows * stride_c, rows);
    if (has_columns) store(to + labels.columns * stride_c, columns);
  }
}

enum class Pass {
  kScore,   // score the pixels, and add up the gradient of their cross-entropy
  kHard,    // the boundary term of the selected pixels, and its gradient
  kMapped,  // both gradients and the boundary term, from max and log-sum-exp maps, for a group of the classes
};

// The cells of a block lie between two source rows; each lane has those output columns whose left source column is its
// own, each warp one output row at a time. A thread adds the gradients of its row over the columns, as a sum and as the
// share of the right source column; the block then adds the rows.
template <int K>
struct CellRows {
  float *left, *step, *sum, *right;  // [classes, kCells] of a warp: logits at the lane's columns; the gradient
  float *upper, *lower;              // [classes, kNodes] of the block
  const int classes;

  __device__ CellRows(float* shared, int classes) : classes(classes) {
    const int plane = classes * kCells, warp = threadIdx.x / 32;
    left = shared + 4 * warp * plane, step = left + plane, sum = step + plane, right = sum + plane;
    upper = shared + 4 * kWarps * plane, lower = upper + classes * kNodes;
  }

  // Logits of a row at the lane's source columns. Few loads at a time: all would not fit the registers.
  __device__ void interpolate(const Lerped& corners, int first_class, int lane) {
#pragma unroll 4
    for (int c = 0; c < classes; ++c) {
      const float from = corners.left(first_class + c);
      left[c * kCells + lane] = from, step[c * kCells + lane] = corners.to_right(first_class + c);
    }
  }
  __device__ void clear_block() {
    for (int i = threadIdx.x; i < 2 * classes * kNodes; i += blockDim.x) upper[i] = 0;
  }
  __device__ void clear_row(int lane) {
    for (int c = 0; c < classes; ++c) sum[c * kCells + lane] = right[c * kCells + lane] = 0;
  }
  __device__ void take(int label, int lane, float share, float amount) {
    sum[label * kCells + lane] -= amount;
    right[label * kCells + lane] -= share * amount;
  }
  // Add the rows that the warps hold, `down` of each to its lower source row.
  __device__ void fold(const float* down, int rows) {
    const int own = threadIdx.x / 32, plane = classes * kCells;
    const float *sums = sum - 4 * own * plane, *rights = right - 4 * own * plane;
    for (int i = threadIdx.x; i < classes * kNodes; i += blockDim.x) {
      const int c = i / kNodes, node = i % kNodes, at = c * kCells + node;
      float above = upper[i], below = lower[i];
      for (int row = 0; row < rows; ++row) {
        const int held = at + 4 * row * plane;
        const float own_part = node < kCells ? sums[held] - rights[held] : 0.0f;
        const float value = own_part + (node > 0 ? rights[held - 1] : 0.0f);
        above = fmaf(1 - down[row], value, above), below = fmaf(down[row], value, below);
      }
      upper[i] = above, lower[i] = below;
    }
  }
};

template <int K, Pass kPass, bool kGradient>
__global__ void __launch_bounds__(kWarps * 32, kGradient && K <= 19 ? 3 : 2) cells_kernel(
    const Bcl call, const Scratch scratch) {
  BCM_DYNAMIC_SHARED(float, shared);
  __shared__ float down[kWarps];
  __shared__ double rows_ces[kWarps * 32];  // of a thread: a cell may have thousands of columns
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_class = static_cast<int>(blockIdx.z) * K;
  const int classes = min(K, static_cast<int>(call.classes) - first_class);
  CellRows<K> rows(shared, classes);
  const int image = static_cast<int>(blockIdx.x / static_cast<unsigned>(call.in_height));
  const int row = static_cast<int>(blockIdx.x % static_cast<unsigned>(call.in_height));
  const int cell = static_cast<int>(blockIdx.y) * kCells + lane;
  const int begin = static_cast<int>(first_output(row, call.in_height, call.out_height));
  const int end = static_cast<int>(first_output(row + 1, call.in_height, call.out_height));
  const bool inside = cell < call.in_width;
  const int begin_x = inside ? static_cast<int>(first_output(cell, call.in_width, call.out_width)) : 0;
  const int end_x = inside ? static_cast<int>(first_output(cell + 1, call.in_width, call.out_width)) : 0;
  const bool has_right = high_of(cell, call.in_width, call.out_width) != cell;
  // share_of, one column after the other: `ahead` of the lane's source column, in steps.
  const float per_step = 1 / static_cast<float>(2 * call.out_width);
  const int in_step = has_right ? static_cast<int>(2 * call.in_width) : 0;
  const int64_t first_ahead = (2 * begin_x + 1) * call.in_width - call.out_width - 2 * call.out_width * cell;
  const int begin_ahead = has_right ? static_cast<int>(first_ahead) : 0;
  const bool has_below = high_of(row, call.in_height, call.out_height) != row;
  const Target target{call, image};
  const BclOptions& options = call.options;
  float of_hard = 0, hard_sum = 0;
  if (kPass != Pass::kScore && selects(call)) of_hard = scratch.factors->hard;
  const float of_ce = kPass != Pass::kHard && options.ce_weight != 0 ? 1.0f : 0.0f;
  float ces = 0;
  unsigned flags = 0;
  bool wrote = kPass != Pass::kHard;
  rows_ces[threadIdx.x] = 0;
  if (kGradient) rows.clear_block();

  for (int first_row = begin; first_row < end; first_row += kWarps) {
    const int y = first_row + warp;
    bool works = y < end;
    if (works && kPass == Pass::kHard) {
      bool any = false;
      for (int x = begin_x; x < end_x; ++x) any |= is_selected(call, scratch, image, y, x);
      works = __any_sync(kWarp, any);
    }
    wrote |= works;
    if (kGradient && y < end) rows.clear_row(lane);
    if (works) {
      const Source source_row{row, row + has_below, share_of(y, row, call.in_height, call.out_height)};
      if (lane == 0) down[warp] = has_below ? source_row.share : 0.0f;
      const int64_t source_cell = inside ? cell : 0;
      const Lerped corners(call, image, source_row, Source{source_cell, source_cell + (inside && has_right), 0.0f});
      rows.interpolate(corners, first_class, lane);
      float left[K], step[K], sum[K] = {}, right[K] = {};
#pragma unroll
      for (int i = 0; i < K; ++i) {
        left[i] = i < classes ? rows.left[i * kCells + lane] : -kInfinity;
        step[i] = i < classes ? rows.step[i * kCells + lane] : 0.0f;
      }
      const int64_t pixel_row = image * call.out_height + y;
      uint16_t* const scores = scratch.score + pixel_row * scratch.score_pitch;  // and labels, up to kMostClasses
      int ahead = begin_ahead;
      for (int x = begin_x; x < end_x; ++x, ahead += in_step) {
        const bool selected = kPass != Pass::kScore && is_selected(call, scratch, image, y, x);
        if (kPass == Pass::kHard && !selected) continue;
        const float share = ahead > 0 ? static_cast<float>(ahead) * per_step : 0.0f;
        Labels labels;
        if (kPass == Pass::kScore) labels = Narrow::unpacked(scores[x]);
        if (kPass == Pass::kHard) labels = target.of_term(y, x);
        if (kPass == Pass::kMapped) labels = Wide::unpacked(scratch.labels[pixel_row * scratch.score_pitch + x]);
        uint16_t score = 0;
        if (labels.own >= 0) {
          float z[K], shift, scale, log_sum;
#pragma unroll
          for (int i = 0; i < K; ++i) z[i] = fmaf(share, step[i], left[i]);
          if (kPass == Pass::kMapped) {
            const int64_t at = pixel_row * call.out_width + x;
            shift = kLog2E * scratch.best[at], log_sum = kLog2E * scratch.lse[at], scale = exp2_of(-log_sum);
          } else {
            float largest = -kInfinity;
#pragma unroll
            for (int i = 0; i < K; ++i) largest = fmaxf(largest, z[i]);
            shift = kLog2E * largest;
          }
          float total = 0;
#pragma unroll
          for (int i = 0; i < K; ++i) z[i] = exp2_of(exponent(z[i], shift)), total += z[i];
          if (kPass != Pass::kMapped) log_sum = log2f(total), scale = 1 / total;
          if (kPass == Pass::kScore || (selected && first_class == 0)) {
            const CrossEntropies ce(labels, [&](int label) {
              float value;
              if (kPass == Pass::kMapped) {
                value = Lerped(call, image, source_row, Source{cell, cell + has_right, share})(label);
              } else {
                value = fmaf(share, rows.step[label * kCells + lane], rows.left[label * kCells + lane]);
              }
              return cross_entropy(call, log_sum, exponent(value, shift));
            });
            const float weight = weight_of(call, labels.own);
            if (kPass == Pass::kScore) {
              const float s = ce.sum(options.score);
              ces += times_weight(weight, ce.own), flags |= isnan(s) ? kNan : 0, score = on_grid_of(s);
            } else {
              hard_sum += times_weight(weight, ce.sum(options.terms));
            }
          }
          const Amounts<float> amounts = amounts_of(call, labels, selected, of_ce, of_hard);
          if (kGradient && amounts.total != 0) {
            const float each = amounts.total * scale, each_right = each * share;
#pragma unroll
            for (int i = 0; i < K; ++i) sum[i] = fmaf(each, z[i], sum[i]), right[i] = fmaf(each_right, z[i], right[i]);
            const auto take = [&](int label, float amount) {
              const int i = label - first_class;
              if (amount != 0 && i >= 0 && i < classes) rows.take(i, lane, share, amount);
            };
            take(labels.own, amounts.own);
            if (kPass != Pass::kScore) take(labels.rows, amounts.rows), take(labels.columns, amounts.columns);
          }
        }
        if (kPass == Pass::kScore && selects(call)) scores[x] = score;
      }
      if (kPass == Pass::kScore) {
        rows_ces[threadIdx.x] += ces;
        ces = 0;
      }
#pragma unroll
      for (int i = 0; kGradient && i < K; ++i) {
        if (i >= classes) continue;
        rows.sum[i * kCells + lane] += sum[i], rows.right[i * kCells + lane] += right[i];
      }
    } else if (lane == 0) {
      down[warp] = 0;
    }
    if (kGradient) {
      __syncthreads();
      rows.fold(down, min(kWarps, end - first_row));
      __syncthreads();
    }
  }
  if (kPass == Pass::kScore)
    write_partial(0, rows_ces[threadIdx.x], 0, flags, scratch.scored + block_number());
  if (kPass != Pass::kScore && selects(call) && blockIdx.z == 0) write_sum(hard_sum, scratch.hard + block_number());
  if (!kGradient) return;
  const bool adds = kPass == Pass::kHard && options.ce_weight != 0;
  if (!__syncthreads_or(wrote) && adds) return;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  const int64_t at = (block * call.classes + first_class) * kNodes;
  for (int i = threadIdx.x; i < classes * kNodes; i += blockDim.x) {
    scratch.upper[at + i] = (adds ? scratch.upper[at + i] : 0.0f) + rows.upper[i];
    scratch.lower[at + i] = (adds ? scratch.lower[at + i] : 0.0f) + rows.lower[i];
  }
}

// The gradient of a source pixel: of the cells below and above it, and of the block of cells to its left.
__global__ void __launch_bounds__(kThreads) gather_kernel(
    const Bcl call, const Scratch scratch, float* gradient, const int64_t segments) {
  const int64_t unit = blockIdx.x, image = unit / call.in_height, row = unit % call.in_height;
  const float scale = scratch.factors->scale;
  for (int64_t i = threadIdx.x; i < call.classes * call.in_width; i += kThreads) {
    const int64_t c = i / call.in_width, x = i % call.in_width, segment = x / kCells;
    const auto parts = [&](int64_t part, int64_t node) {
      const int64_t below = ((unit * segments + part) * call.classes + c) * kNodes + node;
      const float lower = row > 0 ? scratch.lower[below - segments * call.classes * kNodes] : 0.0f;
      return scratch.upper[below] + lower;
    };
    float sum = parts(segment, x % kCells);
    if (x % kCells == 0 && segment > 0) sum += parts(segment - 1, kCells);
    const float value = call.classes == 1 ? 0.0f : scale * sum;
    gradient[((image * call.classes + c) * call.in_height + row) * call.in_width + x] = value;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) widen_kernel(const Bcl call, float* to) {
  const int64_t unit = blockIdx.x, image = unit / call.in_height, row = unit % call.in_height;
  const int64_t* stride = call.logits_stride;
  const T* from = static_cast<const T*>(call.logits) + image * stride[0] + row * stride[2];
  for (int64_t i = threadIdx.x; i < call.classes * call.in_width; i += kThreads) {
    const int64_t c = i / call.in_width, x = i % call.in_width;
    to[((image * call.classes + c) * call.in_height + row) * call.in_width + x] =
        as_float(from[c * stride[1] + x * stride[3]]);
  }
}

// ---- Launches

// Each launch returns a cudaError_t: what the runtime says of a launch, or of a setting that it needs.

// Return launch(K) of the number of classes that a thread shall hold: CamVid's, Cityscapes', or the most.
template <typename Launch>
int by_classes(int64_t classes, Launch launch) {
  if (classes <= 11) return launch(std::integral_constant<int, 11>());
  if (classes <= 19) return launch(std::integral_constant<int, 19>());
  return launch(std::integral_constant<int, kMostClasses>());
}

// Return launch(T()) of the logits' type.
template <typename Launch>
int by_type(DType type, Launch launch) {
  switch (type) {
    case DType::kFloat16: return launch(__half());
    case DType::kBFloat16: return launch(__nv_bfloat16());
    default: return launch(float());
  }
}

template <int K, Pass kPass, bool kGradient>
int launch_cells(const Bcl& call, const Scratch& scratch, void* stream) {
  const int classes = static_cast<int>(call.classes < K ? call.classes : K);
  const int bytes = 4 * classes * (4 * kWarps * kCells + 2 * kNodes);
  const auto kernel = cells_kernel<K, kPass, kGradient>;
  BCM_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  BCM_LAUNCH((cells_kernel<K, kPass, kGradient>), cell_grid(call), kWarps * 32, bytes, stream, call, scratch);
  return cudaGetLastError();
}

template <Pass kPass>
int launch_cells(const Bcl& call, const Scratch& scratch, bool gradient, void* stream) {
  return by_classes(call.classes, [&](auto k) {
    constexpr int K = decltype(k)::value;
    return gradient ? launch_cells<K, kPass, true>(call, scratch, stream)
                    : launch_cells<K, kPass, false>(call, scratch, stream);
  });
}

int launch_selection(const Bcl& call, const Scratch& scratch, void* stream) {
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

int launch_widening(const Bcl& call, const Scratch& scratch, void* stream) {
  return by_type(call.logits_type, [&](auto zero) {
    using T = decltype(zero);
    BCM_LAUNCH(widen_kernel<T>, static_cast<unsigned>(units_of(call)), kThreads, 0, stream, call, scratch.logits);
    return cudaGetLastError();
  });
}

// The call with its low-resolution logits as float32.
Bcl widened(const Bcl& call, const Scratch& scratch) {
  Bcl wide = call;
  wide.logits = scratch.logits, wide.logits_type = DType::kFloat32;
  const int64_t plane = call.in_height * call.in_width;
  const int64_t stride[4] = {call.classes * plane, plane, call.in_width, 1};
  for (int i = 0; i < 4; ++i) wide.logits_stride[i] = stride[i];
  return wide;
}

int forward_full(const Bcl& call, Scratch scratch, const BclOutputs& outputs, void* stream) {
  scratch.lse = outputs.lse;
  BCM_LAUNCH(labels_kernel, pixel_grid(call), kThreads, 0, stream, call, scratch);
  BCM_TRY(by_type(call.logits_type, [&](auto zero) {
    return by_classes(call.classes, [&](auto k) {
      using Logits = Full<decltype(zero)>;
      BCM_LAUNCH(
          (score_pixels_kernel<Logits, decltype(k)::value>), pixel_grid(call), kThreads, 0, stream, call, scratch);
      return cudaGetLastError();
    });
  }));
  if (selects(call)) BCM_TRY(launch_selection(call, scratch, stream));
  BCM_LAUNCH(resolve_kernel, 1, kThreads, 0, stream, call, scratch, outputs);
  if (selects(call)) {
    BCM_LAUNCH(select_kernel, pixel_grid(call), kThreads, 0, stream, call, scratch, outputs);
  } else if (outputs.mask) {
    const int64_t pixels = call.batch * call.out_height * call.out_width;
    BCM_TRY(cudaMemsetAsync(outputs.mask, 0, pixels, static_cast<cudaStream_t>(stream)));
  }
  return cudaGetLastError();
}

int forward_upsampled(const Bcl& given, const Scratch& scratch, const BclOutputs& outputs, void* stream) {
  if (scratch.logits) BCM_TRY(launch_widening(given, scratch, stream));
  const Bcl call = scratch.logits ? widened(given, scratch) : given;
  const bool gradient = outputs.gradient != nullptr;
  BCM_LAUNCH(labels_kernel, pixel_grid(call), kThreads, 0, stream, call, scratch);
  if (is_wide(call)) {
    BCM_LAUNCH(
        (score_pixels_kernel<Lerped, kMostClasses>), pixel_grid(call), kThreads, 0, stream, call, scratch);
  } else {
    BCM_TRY(launch_cells<Pass::kScore>(call, scratch, gradient && call.options.ce_weight != 0, stream));
  }
  if (selects(call)) BCM_TRY(launch_selection(call, scratch, stream));
  BCM_LAUNCH(resolve_kernel, 1, kThreads, 0, stream, call, scratch, outputs);
  if (is_wide(call) && gradient) {
    BCM_TRY((launch_cells<kMostClasses, Pass::kMapped, true>(call, scratch, stream)));
  } else if (is_wide(call) && selects(call)) {
    BCM_TRY((launch_cells<kMostClasses, Pass::kMapped, false>(call, scratch, stream)));
  } else if (!is_wide(call) && (selects(call) || (gradient && call.options.ce_weight == 0))) {
    BCM_TRY(launch_cells<Pass::kHard>(call, scratch, gradient, stream));
  }
  if (gradient)
    BCM_LAUNCH(
        gather_kernel, static_cast<unsigned>(units_of(call)), kThreads, 0, stream, call, scratch, outputs.gradient,
        segments_of(call));
  return cudaGetLastError();
}

}  // namespace
}  // namespace bcmfnet

extern "C" int64_t bcl_scratch_bytes_cuda(const bcmfnet::Bcl* call, bool saves) {
  bcmfnet::Arena arena{nullptr};
  bcmfnet::lay_out(*call, saves, arena);
  return arena.bytes;
}

extern "C" int bcl_forward_cuda(
    const bcmfnet::Bcl* call, const bcmfnet::BclOutputs* outputs, void* memory, bool saves, void* stream) {
  using namespace bcmfnet;
  Arena arena{static_cast<char*>(memory)};
  Bcl shown = *call;
  const Scratch scratch = lay_out(shown, saves, arena);
  if (shown.batch == 0) {
    shown.options.boundary_weight = 0;  // no image, no block: nothing has been counted
    BCM_LAUNCH(resolve_kernel, 1, kThreads, 0, stream, shown, scratch, *outputs);
  } else if (upsampled(shown)) {
    BCM_TRY(forward_upsampled(shown, scratch, *outputs, stream));
  } else {
    BCM_TRY(forward_full(shown, scratch, *outputs, stream));
  }
  BCM_LAUNCH(finish_kernel, 1, kThreads, 0, stream, shown, scratch, *outputs);
  return cudaGetLastError();
}

extern "C" int bcl_backward_cuda(
    const bcmfnet::Bcl* call, const float* grad, const float* lse, const uint8_t* mask, const float* scales,
    void* gradient, const int64_t* stride, void* stream) {
  using namespace bcmfnet;
  if (call->batch == 0) return cudaSuccess;
  return by_type(call->logits_type, [&](auto zero) {
    return by_classes(call->classes, [&](auto k) {
      using T = decltype(zero);
      BCM_LAUNCH(
          (gradient_kernel<T, decltype(k)::value>), pixel_grid(*call), kThreads, 0, stream, *call, grad, lse, mask,
          scales, static_cast<T*>(gradient), stride[0], stride[1], stride[2], stride[3]);
      return cudaGetLastError();
    });
  });
}
