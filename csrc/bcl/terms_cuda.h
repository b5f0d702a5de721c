// The terms beside cross-entropy and boundary term, at a pixel: what it adds to the sums, and its gradient, which is
//
//   p[c] (total + u slopes[c]) - spread w[c] + distillation (softmax(z / T)[c] - softmax(t / T)[c])
//
// less what its labels take. bcmfnet/reference/terms.py defines them.
#pragma once

#include "bcl/pixels_cuda.h"
#include "common/bilinear.h"

namespace bcmfnet {
namespace {

// Classes that have no channel and read as 0: the background of binary logits.
__device__ inline int classes_before_channels(const Bcl& call) { return call.options.binary ? 1 : 0; }

__device__ inline float weight_of_class(const Bcl& call, int label) {
  return call.options.binary ? (label == 0 ? 1.0f : call.options.pos_weight) : class_weight_of(call, label);
}

// The element type of logits that is known when a kernel runs.
struct AnyFloat {};
template <typename T>
__device__ float load(const void* data, int64_t at, DType) {
  return as_float(static_cast<const T*>(data)[at]);
}
template <>
__device__ inline float load<AnyFloat>(const void* data, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return as_float(static_cast<const __half*>(data)[at]);
    case DType::kBFloat16: return as_float(static_cast<const __nv_bfloat16*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

// Logits of a pixel: with kLerps between four source pixels, which may be one.
template <typename T, bool kLerps>
struct Sampled {
  const void* data;
  int64_t top, down, right, stride;
  float weight_x, weight_y;
  int absent;  // classes before the first channel
  DType dtype;

  __device__ Sampled(const Bcl& call, const View& view, int64_t image, const Source& row, const Source& column)
      : data(view.data), stride(view.channel_stride), weight_x(column.weight), weight_y(row.weight),
        absent(classes_before_channels(call)), dtype(view.dtype) {
    top = offset_of(view, image, 0, row.low, column.low) - absent * stride;
    down = (row.high - row.low) * view.row_stride, right = (column.high - column.low) * view.column_stride;
  }
  __device__ float at(int64_t offset) const { return load<T>(data, offset, dtype); }
  __device__ float column(int64_t offset) const {
    const float from = at(offset);
    return kLerps && down != 0 ? fmaf(weight_y, at(offset + down) - from, from) : from;
  }
  __device__ float left(int c) const { return c < absent ? 0.0f : column(top + c * stride); }
  __device__ float to_right(int c) const {
    return c < absent || right == 0 ? 0.0f : column(top + c * stride + right) - left(c);
  }
  __device__ float operator()(int c) const { return kLerps ? fmaf(weight_x, to_right(c), left(c)) : left(c); }
  // K classes from `first` on, -inf beyond the last one.
  template <int K>
  __device__ void read(int first, int classes, float* z) const {
    constexpr int kUnrolled = kLerps ? 4 : K;
#pragma unroll kUnrolled
    for (int i = 0; i < K; ++i) z[i] = first + i < classes ? (*this)(first + i) : -kInfinity;
  }
};

// Logits of a view at a pixel of the target.
template <typename T, bool kLerps>
__device__ Sampled<T, kLerps> sampled(const Bcl& call, const View& view, int64_t image, int y, int x) {
  const bool align = call.options.align_corners;
  Source row{y, y, 0.0f}, column{x, x, 0.0f};
  if (kLerps && view.height != call.target.height) row = source_of(y, view.height, call.target.height, align);
  if (kLerps && view.width != call.target.width) column = source_of(x, view.width, call.target.width, align);
  return {call, view, image, row, column};
}

// -log p of a class from its exponent and the logarithm of the sum to base 2. Of one class it is exactly 0.
__device__ inline float negative_log(int classes, float log_sum, float exponent_of_class) {
  const float ce = (classes == 1 ? 0.0f : kLn2) * (log_sum - exponent_of_class);
  return ce < 0 ? 0.0f : ce;  // a rounding
}

__device__ inline float focal_of(float ce, float gamma) {
  return gamma == 0 ? ce : powf(-expm1f(-ce), gamma) * ce;
}

// Its derivative by the cross-entropy, which a gradient has in place of cross-entropy's 1.
__device__ inline float focal_slope_of(float ce, float gamma) {
  if (gamma == 0) return 1;
  const float miss = -expm1f(-ce), p = expf(-ce);
  const float power = powf(miss, gamma), slope = power + gamma * power / miss * (p > 0 ? p * ce : 0.0f);
  return miss == 0 ? 0.0f : slope;
}

// What label smoothing spreads over the classes, but for its factor; `ce_of(label)` is the cross-entropy of a label.
template <typename Of>
__device__ float spread_of(const Bcl& call, const Of& ce_of) {
  const int classes = static_cast<int>(classes_of(call));
  float sum = 0;
#pragma unroll 4
  for (int c = 0; c < classes; ++c) sum += times_weight(weight_of_class(call, c), ce_of(c));
  return sum;
}

// The logarithm, to base 2, of the softmax of logits over the temperature.
struct Tempered {
  float unit, shift, log_sum;

  __device__ Tempered(const Bcl& call, float best, float log_sum)
      : unit(kLog2E / call.options.temperature), shift(best == -kInfinity ? 0.0f : unit * best), log_sum(log_sum) {}
  template <typename Logits>
  __device__ static Tempered of(const Bcl& call, const Logits& logits, float best) {
    Tempered result(call, best, 0.0f);
    float sum = 0;
    for (int c = 0; c < classes_of(call); ++c) sum += exp2_of(result(logits(c)));
    result.log_sum = log2f(sum);
    return result;
  }
  __device__ float operator()(float z) const { return fmaf(unit, z, -shift) - log_sum; }
};

template <typename Logits>
__device__ float largest_of(const Bcl& call, const Logits& logits) {
  float best = -kInfinity;
  for (int c = 0; c < classes_of(call); ++c) best = fmaxf(best, logits(c));
  return best;
}

// KL(softmax(t / T) || softmax(z / T)), but for T^2.
template <typename Logits, typename Teacher>
__device__ float divergence(
    const Bcl& call, const Tempered& student, const Logits& logits, const Tempered& teacher, const Teacher& taught) {
  const int classes = static_cast<int>(classes_of(call));
  float sum = 0;
  for (int c = 0; c < classes; ++c) {
    const float log_t = teacher(taught(c)), t = exp2_of(log_t);
    if (!(t <= 0)) sum += t * (log_t - student(logits(c)));
  }
  return kLn2 * sum;
}

// Whether the distillation loss is over a pixel.
__device__ inline bool is_distilled(const Bcl& call, const Labels& labels, float weight) {
  return distills(call) && weight != 0 && (labels.own >= 0 || call.options.everywhere);
}

// What pixels add up, weighted: cross-entropy and others.
struct Losses {
  float ce = 0, spread = 0, focal = 0, distillation = 0;
  unsigned flags = 0;
};

struct Scored {
  uint16_t score;
  float term;  // the boundary term, weighted
};

// Adds the losses of a pixel that has a label, the weight u, and with that of its class `weight`; `exponent_of(label)` is
// to base 2, as the logarithm of the sum is.
template <typename Of>
__device__ Scored score_of(
    const Bcl& call, const Labels& labels, float u, float weight, float log_sum, const Of& exponent_of,
    Losses& losses) {
  const BclOptions& options = call.options;
  const int classes = static_cast<int>(classes_of(call));
  const auto ce_of = [&](int label) { return negative_log(classes, log_sum, exponent_of(label)); };
  const float own = ce_of(labels.own);
  losses.ce += times_weight(weight, own);
  if (options.smoothing != 0) losses.spread += u * spread_of(call, ce_of);
  if (options.focal_weight != 0) losses.focal += times_weight(weight, focal_of(own, options.gamma));
  if (!selects(call)) return {};
  CrossEntropies ce(labels, [&](int label) { return label == labels.own ? own : ce_of(label); });
  const float score = ce.sum(options.score);
  losses.flags |= isnan(score) ? kNan : 0;
  if (options.focal_boundary) {
    ce.own = focal_of(ce.own, options.gamma);
    ce.rows = focal_of(ce.rows, options.gamma), ce.columns = focal_of(ce.columns, options.gamma);
  }
  return {on_grid_of(score), times_weight(weight, ce.sum(options.terms))};
}

// What the gradients of an image's pixels share.
struct Shares {
  TermFactors factors;
  const float* slopes;  // [2, classes]: of overlap by P and I, or null
  float weights = 0;    // the sum of those of the classes, where labels are smoothed

  // `scales` are those of ce, boundary, distillation.
  __device__ Shares(const Bcl& call, const float* scales, const float* slopes, int64_t image)
      : factors(term_factors_of(call.options, classes_of(call), scales, true)),
        slopes(has_overlap(call.options) ? slopes : nullptr) {
    if (call.options.ce_weight == 0) factors.ce = factors.spread = 0;  // even where a scale is not a number
    if (call.options.overlap.per_image) this->slopes += this->slopes ? 2 * image * classes_of(call) : 0;
    for (int c = 0; call.options.smoothing != 0 && c < classes_of(call); ++c) weights += weight_of_class(call, c);
  }
};

// What the gradient of a pixel is made of.
struct PixelGradient {
  Amounts<float> amounts{};  // the total is the factor of p, but for the slopes
  float overlap = 0, spread = 0, distillation = 0;
  bool counts = false;  // whether it has more than distillation

  // `weight` is u by that of the label's class, `inner` the sum of p by the slopes, `log_of(label)` the logarithm of p to
  // base 2.
  template <typename Of>
  __device__ PixelGradient(
      const Bcl& call, const Shares& shares, const Labels& labels, float u, float weight, bool selected, float inner,
      const Of& log_of) {
    const BclOptions& options = call.options;
    const TermFactors& factors = shares.factors;
    const int classes = static_cast<int>(classes_of(call));
    if (classes == 1) return;
    if (is_distilled(call, labels, u)) distillation = factors.distillation * u;
    if (labels.own < 0) return;
    const auto slope_of = [&](int label) {
      return focal_slope_of(negative_log(classes, 0.0f, log_of(label)), options.gamma);
    };
    float ce = factors.ce * weight, boundary[3] = {};
    if (options.focal_weight != 0 && weight != 0) ce += factors.focal * slope_of(labels.own) * weight;
    if (selected && weight != 0) {
      const int of[3] = {labels.own, labels.rows, labels.columns};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (options.terms[i] == 0 || of[i] < 0) continue;
        const float slope = options.focal_boundary ? slope_of(of[i]) : 1.0f;
        boundary[i] = options.terms[i] * (factors.boundary * weight) * slope;
      }
    }
    amounts = {ce + boundary[0], boundary[1], boundary[2], ce + boundary[0] + boundary[1] + boundary[2]};
    if (options.smoothing != 0) {
      spread = factors.spread * u;
      amounts.total += spread * shares.weights;
    }
    if (shares.slopes != nullptr) {
      const float of_own = u * shares.slopes[classes + labels.own] * exp2_of(log_of(labels.own));
      overlap = u, amounts.own -= of_own, amounts.total -= u * inner + of_own;
    }
    counts = shares.slopes != nullptr || amounts.total != 0 || amounts.own != 0;
  }
};

// I, P and Y of a warp's pixels. Each lane adds up its own, then lane c those of class c.
struct Tally {
  // Of a class, in floats: two or one of each lane, with a gap so that lanes that read 16 bytes each meet all banks.
  static constexpr int kPitch = 68, kPitchOfOne = 36;

  float* const held;   // [classes, kPitch] of the warp: I and Y of each lane
  float2* const own;   // of the lane, [classes, kPitch / 2]
  const int classes;
  double sums[3] = {};

  // `shared` is that of the block, of which each warp has a part.
  __device__ Tally(float* shared, int classes)
      : held(shared + static_cast<int>(threadIdx.x / 32) * classes * kPitch),
        own(reinterpret_cast<float2*>(held) + threadIdx.x % 32), classes(classes) {
    clear();
  }
  static int bytes(int classes, int threads) { return 4 * kPitch * classes * (threads / 32); }
  __device__ void clear() {
    for (int c = 0; c < classes; ++c) own[c * (kPitch / 2)] = make_float2(0.0f, 0.0f);
  }
  __device__ void take(int label, float weight, float p) {
    float2& at = own[label * (kPitch / 2)];
    at = make_float2(fmaf(weight, p, at.x), at.y + weight);
  }
  // Of the lane's class, the sums of every other float.
  template <int kFloats>
  __device__ float2 sum_of_lanes() const {
    constexpr int kOfClass = kFloats == 64 ? kPitch : kPitchOfOne;
    const int lane = threadIdx.x % 32;
    float2 sum{};
    if (lane >= classes) return sum;
    const float4* const values = reinterpret_cast<const float4*>(held + lane * kOfClass);
#pragma unroll
    for (int i = 0; i < kFloats / 4; ++i) {
      const float4 four = values[i];
      sum.x += four.x + four.z, sum.y += four.y + four.w;
    }
    return sum;
  }
  // Adds what the lanes hold, with their sums of p; before more is taken, it must be cleared. Of a whole warp.
  template <int K>
  __device__ void fold(float (&predicted)[K]) {
    __syncwarp();
    const float2 both = sum_of_lanes<64>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if (i < classes) held[i * kPitchOfOne + threadIdx.x % 32] = predicted[i];
      predicted[i] = 0;
    }
    __syncwarp();
    const float2 of_p = sum_of_lanes<32>();
    sums[0] += both.x, sums[1] += of_p.x + of_p.y, sums[2] += both.y;
    __syncwarp();
  }
  // Writes the sums of the block's warps to [3, all_classes]. Of a whole block.
  __device__ void write(float* to, int64_t all_classes) const {
    __shared__ double of_warps[kThreads / 32][3][32];
    for (int i = 0; i < 3; ++i) of_warps[threadIdx.x / 32][i][threadIdx.x % 32] = sums[i];
    __syncthreads();
    if (threadIdx.x >= classes) return;
    for (int i = 0; i < 3; ++i) {
      double sum = 0;
      for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += of_warps[warp][i][threadIdx.x];
      to[i * all_classes + threadIdx.x] = static_cast<float>(sum);
    }
  }
};

__device__ inline void write_terms(const TermSums& sums, TermSums* to) {
  __shared__ double doubles[kThreads / 32];
  const TermSums total{sum_of_block(sums.labelled, doubles), sum_of_block(sums.distilled, doubles),
                       sum_of_block(sums.spread, doubles), sum_of_block(sums.focal, doubles),
                       sum_of_block(sums.distillation, doubles)};
  if (threadIdx.x == 0) *to = total;
}

}  // namespace
}  // namespace bcmfnet
