// The room of upsampled logits. What is done at a pixel of a cell is a Pass.
#include "bcl/columns_cuda.h"

namespace bcmfnet {
namespace {

// What the columns of a block share.
template <int K, bool kExact, int kSets>
struct Columns {
  // Whose gradient a block has before it adds them to the nodes.
  static constexpr int kHeld = K * kSets <= 19 ? 256 : 128;
  static constexpr int kSlots = slot_of(kHeld);
  float2* nodes;     // [classes, kNodes], see read_nodes
  float2* lines;     // [classes, threads]: the same at a thread's column; before it, zeros for a label that is absent
  float2* gradient;  // [kSets, classes, kSlots]: the sum over the rows, and the part of the lower source row
  const int given;

  __device__ Columns(float2* shared, int classes)
      : nodes(shared), lines(nodes + classes * kNodes + kWarps * 32), gradient(lines + classes * kWarps * 32),
        given(classes) {}
  __device__ int classes() const { return kExact ? K : given; }
  static int bytes(int classes, bool gradient) {
    return 8 * (classes * (kNodes + kWarps * 32 + (gradient ? kSets * kSlots : 0)) + kWarps * 32);
  }
};

// A pass scores the pixels, and adds up the gradient of their cross-entropy.
struct ScorePass {
  static constexpr bool kDecides = false;
  const Bcl& call;
  const Scratch& scratch;
  uint16_t* rows = nullptr;   // the labels of pixels, then their scores
  unsigned at = 0;            // the pixel
  float own = 0;              // the weighted cross-entropy of the pixel
  float ces = 0, scores = 0;  // sums of some rows: a cell may have thousands
  double sum = 0;
  unsigned flags = 0;

  __device__ ScorePass(const Bcl& call, const Scratch& scratch) : call(call), scratch(scratch) {}
  __device__ void begin_rows(int y, int x, int64_t image) {
    rows = scratch.score + (image * call.target.height + y) * scratch.score_pitch, at = x;
    ces = scores = 0;
  }
  __device__ Labels labels() const { return Narrow::unpacked(rows[at]); }
  __device__ uint16_t add(const CrossEntropies& ce, float weight) {
    const float s = ce.sum(call.options.score);
    own = times_weight(weight, ce.own), ces += own, scores += s;
    return on_grid_of(s);
  }
  __device__ void end_pixel(uint16_t score) {
    if (selects(call)) rows[at] = score;
    at += static_cast<unsigned>(scratch.score_pitch);
  }
  __device__ void end_rows() { sum += ces, flags |= isnan(scores) ? kNan : 0; }
  __device__ void finish() const {
    write_scored(sum, flags, scratch.scored + block_number());
  }
};

// The same where the score decides: also the boundary term of the selected pixels, and its gradient.
struct DecidingPass : ScorePass {
  static constexpr bool kDecides = true;
  const int least;
  int selected = 0;
  float boundary = 0;

  __device__ DecidingPass(const Bcl& call, const Scratch& scratch)
      : ScorePass(call, scratch), least(max(call.options.selection.tau, 1)) {}
  __device__ bool selects_pixel(const CrossEntropies& ce, float weight, uint16_t score) {
    if (score < least) return false;
    ++selected, boundary += times_weight(weight, ce.sum(call.options.terms));
    return true;
  }
  __device__ Amounts<float> chosen_amounts(const Labels& labels, float weight) const {
    return bcmfnet::amounts_of(call.options.terms, 0.0f, weight, labels.rows >= 0, labels.columns >= 0);
  }
  __device__ void end_pixel(uint16_t) { at += static_cast<unsigned>(scratch.score_pitch); }
  __device__ void finish() const {
    __shared__ int integers[kWarps];
    ScorePass::finish();
    write_sum(boundary, scratch.boundary + block_number());
    const int all = sum_of_block(selected, integers);
    const int64_t image = blockIdx.x / static_cast<unsigned>(call.logits.height);
    if (threadIdx.x == 0 && all != 0)
      atomicAdd(&scratch.histogram[call.options.per_image ? image : 0].high[0], static_cast<uint32_t>(all));
  }
};

// Gradients that a pass adds up apart.
template <typename Visit>
constexpr int kSetsOf = Visit::kDecides ? 2 : 1;

// Of K classes exactly, or of at most so many.
template <typename Visit, int K, bool kExact, bool kGradient>
__global__ void __launch_bounds__(kWarps * 32, kGradient && K * kSetsOf<Visit> <= 19 ? kResident : 2) columns_kernel(
    const Bcl call, const Scratch scratch) {
  constexpr int kSets = kSetsOf<Visit>;
  using Shared = Columns<K, kExact, kSets>;
  constexpr int kHeld = Shared::kHeld, kSlots = Shared::kSlots;
  BCM_DYNAMIC_SHARED(float2, shared);
  __shared__ __align__(16) int edges[CellBlock::kEdges];
  __shared__ float weights_x[kSlots], class_weights[K];
  const int classes = kExact ? K : min(K, static_cast<int>(call.logits.channels));
  const Shared columns(shared, classes);
  const int lane = threadIdx.x % 32;
  const CellBlock block(call, edges);
  if (threadIdx.x < classes) class_weights[threadIdx.x] = class_weight_of(call, threadIdx.x);
  read_nodes<K>(block, classes, columns.nodes);
  __syncthreads();

  const int end_y = block.end_y(), end_x = block.end_x();
  const Across across(block);
  const Down down(block);
  const float nats = nats_of(classes);
  Visit pass(call, scratch);

  for (int first_x = block.begin_x(); first_x < end_x; first_x += kHeld) {
    for (int held = threadIdx.x; held < kHeld; held += kWarps * 32) {
      const int x = first_x + held, slot = slot_of(held);
      if (first_x + held - lane >= end_x) break;
      const bool inside = x < end_x;
      const Across::Column column = across(x);
      weights_x[slot] = column.weight;
      float from[K], slope[K], sum[kSets][K], below[kSets][K];
      float2* const gradient = columns.gradient + slot;
      float2* const lines = columns.lines + threadIdx.x;
      lines[-kWarps * 32] = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int i = 0; i < K; ++i) {
#pragma unroll
        for (int set = 0; set < kSets; ++set) sum[set][i] = below[set][i] = 0;
        from[i] = -kInfinity, slope[i] = 0;
        if (i >= classes) continue;
        const float2 line = line_of(columns.nodes + i * kNodes, column);
        from[i] = line.x, slope[i] = line.y, lines[i * kWarps * 32] = line;
      }
      if (kGradient)
        for (int i = 0; i < kSets * classes; ++i) gradient[i * kSlots] = make_float2(0.0f, 0.0f);
      const auto visit = [&](int y) {
        const float weight_y = down(y);
        const Labels labels = pass.labels();
        uint16_t score = 0;
        if (labels.own >= 0) {
          const Exponentials<K> softmax([&](int i) { return fmaf(weight_y, slope[i], from[i]); });
          const float log_sum = log2_of(softmax.total), part = reciprocal_of(softmax.total);
          const CrossEntropies ce = CrossEntropies::of_all(labels, [&](int label) {
            const float2 line = lines[label * kWarps * 32];
            return cross_entropy(nats, log_sum, fmaf(weight_y, line.y, line.x) - softmax.shift);
          });
          const float weight = class_weights[labels.own];
          score = pass.add(ce, weight);
          const auto differentiate = [&](int set, const Amounts<float>& amounts) {
            if (!kGradient) return;
            const float each = amounts.total * part, each_below = each * weight_y;
#pragma unroll
            for (int i = 0; i < K; ++i) {
              sum[set][i] = fmaf(each, softmax.z[i], sum[set][i]);
              below[set][i] = fmaf(each_below, softmax.z[i], below[set][i]);
            }
            const auto take = [&](int label, float amount) {
              if (amount == 0) return;
              float2& at = gradient[(set * classes + label) * kSlots];
              at = make_float2(at.x - amount, fmaf(-weight_y, amount, at.y));
            };
            take(labels.own, amounts.own);
            if (set > 0) take(labels.rows, amounts.rows), take(labels.columns, amounts.columns);
          };
          differentiate(0, {weight, 0, 0, weight});
          if constexpr (Visit::kDecides) {
            if (pass.selects_pixel(ce, weight, score)) differentiate(1, pass.chosen_amounts(labels, weight));
          }
        }
        pass.end_pixel(score);
      };
      for (int first_y = block.begin_y(); first_y < end_y; first_y += 32) {
        const int last_y = min(end_y, first_y + 32);
        pass.begin_rows(first_y, x, block.image);
        for (int y = first_y; inside && y < last_y; ++y) visit(y);
        pass.end_rows();
      }
      if constexpr (kGradient) {
#pragma unroll
        for (int i = 0; i < K; ++i) {
          if (i >= classes) continue;
#pragma unroll
          for (int set = 0; set < kSets; ++set) {
            float2& at = gradient[(set * classes + i) * kSlots];
            at = make_float2(at.x + sum[set][i], at.y + below[set][i]);
          }
        }
      }
    }
    if constexpr (kGradient) {
      const bool first = first_x == block.begin_x();
      const auto fold = [&](int set, float* upper, float* lower) {
        fold_columns<K, kHeld>(
            columns.gradient + set * classes * kSlots, classes, upper, lower, edges, weights_x, first_x, first);
      };
      __syncthreads();
      fold(0, scratch.upper, scratch.lower);
      if constexpr (Visit::kDecides) fold(1, scratch.chosen_upper, scratch.chosen_lower);
      __syncthreads();
    }
  }
  pass.finish();
}

// The gradient of a source pixel: of the cells below and above it, and of the block of cells to its left. Of one class
// it is 0, unless that is a binary one.
constexpr int kGathered = 128;  // columns of a block, whose threads go over the classes

template <bool kBinary, bool kDecided>
__global__ void __launch_bounds__(kGathered, 8) gather_kernel(
    const Bcl call, const Scratch scratch, float* gradient, const int64_t segments) {
  const unsigned unit = blockIdx.x, height = static_cast<unsigned>(call.logits.height);
  const unsigned image = unit / height, row = unit % height, x = blockIdx.y * kGathered + threadIdx.x;
  const int64_t classes = call.logits.channels, block = classes * kNodes, above = segments * block;
  if (x >= call.logits.width) return;
  const unsigned segment = x / kCells, node = x % kCells;
  int64_t at = (unit * segments + segment) * block + node;
  const Divisors& divisors = scratch.factors->divisors;
  const float scale = divisors.scale, of_chosen = divisors.boundary_factor;
  const bool counts = !kDecided || call.options.ce_weight != 0;
  const bool is_shared = node == 0 && segment > 0;
  const int64_t before = kCells - block;  // the last node of the block to the left
  const int64_t plane = call.logits.height * call.logits.width;
  float* to = gradient + (image * classes * height + row) * call.logits.width + x;
#pragma unroll 4
  for (int64_t c = 0; c < classes; ++c, at += kNodes, to += plane) {
    const auto sum_of = [&](const float* uppers, const float* lowers) {
      const float *const upper = uppers + at, *const lower = lowers + at - above;
      const float sum = upper[0] + (row > 0 ? lower[0] : 0.0f);
      return is_shared ? sum + (upper[before] + (row > 0 ? lower[before] : 0.0f)) : sum;
    };
    float sum = counts ? sum_of(scratch.upper, scratch.lower) : 0.0f;
    if constexpr (kDecided) sum = fmaf(of_chosen, sum_of(scratch.chosen_upper, scratch.chosen_lower), sum);
    *to = !kBinary && classes == 1 ? 0.0f : scale * sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kGathered) widen_kernel(const Bcl call, float* to) {
  const View& logits = call.logits;
  const unsigned height = static_cast<unsigned>(logits.height), image = blockIdx.x / height, row = blockIdx.x % height;
  const unsigned x = blockIdx.y * kGathered + threadIdx.x;
  if (x >= logits.width) return;
  const T* from = static_cast<const T*>(logits.data) + offset_of(logits, image, 0, row, x);
  to += (image * logits.channels * height + row) * logits.width + x;
#pragma unroll 4
  for (int64_t c = 0; c < logits.channels; ++c, from += logits.channel_stride, to += logits.height * logits.width)
    *to = as_float(*from);
}

// Rows of the low-resolution logits, by their columns.
dim3 gather_grid(const Bcl& call) {
  return dim3(static_cast<unsigned>(units_of(call)), blocks_for(call.logits.width, kGathered));
}

template <typename Visit>
int launch_columns(const Bcl& call, const Scratch& scratch, bool gradient, void* stream) {
  return by_classes<Visit::kDecides ? kMostDecided : kMostClasses>(call.logits.channels, [&](auto k) {
    constexpr int K = decltype(k)::value;
    const auto launch = [&](auto exact) {
      constexpr bool kExact = decltype(exact)::value;
      const auto kernel = gradient ? columns_kernel<Visit, K, kExact, true> : columns_kernel<Visit, K, kExact, false>;
      using Shared = Columns<K, kExact, kSetsOf<Visit>>;
      const int bytes = Shared::bytes(static_cast<int>(call.logits.channels), gradient);
      return launch_with_shared(kernel, cell_grid(call), kWarps * 32, bytes, stream, call, scratch);
    };
    return call.logits.channels == K ? launch(std::true_type()) : launch(std::false_type());
  });
}

}  // namespace

int widen(const Bcl& call, const Scratch& scratch, void* stream) {
  return dispatch_float(call.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    BCM_LAUNCH(widen_kernel<T>, gather_grid(call), kGathered, 0, stream, call, scratch.logits);
    return static_cast<int>(cudaGetLastError());
  });
}

int launch_upsampled_scores(const Bcl& call, const Scratch& scratch, bool gradient, void* stream) {
  if (decides(call)) {
    const size_t bytes = scratch.groups * sizeof(Histogram);
    BCM_TRY(cudaMemsetAsync(scratch.histogram, 0, bytes, static_cast<cudaStream_t>(stream)));
    return launch_columns<DecidingPass>(call, scratch, gradient, stream);
  }
  if (!is_wide(call)) return launch_columns<ScorePass>(call, scratch, gradient && call.options.ce_weight != 0, stream);
  BCM_LAUNCH(
      (score_pixels_kernel<Lerped, kMostClasses>), pixel_grid(call), kThreads, 0, stream, call, scratch);
  return cudaGetLastError();
}

int gather_gradient(const Bcl& call, const Scratch& scratch, float* gradient, void* stream) {
  const auto kernel = call.options.binary ? gather_kernel<true, false>
                      : decides(call)     ? gather_kernel<false, true>
                                          : gather_kernel<false, false>;
  BCM_LAUNCH(kernel, gather_grid(call), kGathered, 0, stream, call, scratch, gradient, segments_of(call));
  return cudaGetLastError();
}

}  // namespace bcmfnet
