// The room of logits at full resolution.
#include "bcl/bcl_cuda.h"
#include "bcl/pixels_cuda.h"

namespace bcmfnet {
namespace {

// Logits of a pixel at full resolution.
template <typename T>
struct Full {
  const T* at;
  int64_t stride;

  __device__ Full(const Bcl& call, int64_t image, int y, int x)
      : at(static_cast<const T*>(call.logits.data) + offset_of(call.logits, image, 0, y, x)),
        stride(call.logits.channel_stride) {}
  __device__ float operator()(int64_t c) const { return as_float(at[c * stride]); }
  // K classes from `first` on, -inf beyond the last one.
  template <int K>
  __device__ void read(int first, int classes, float* z) const {
    const T* from = at + first * stride;
#pragma unroll
    for (int i = 0; i < K; ++i, from += stride) z[i] = first + i < classes ? as_float(*from) : -kInfinity;
  }
};

// A thread reads all logits of its pixel before it writes: the gradient may take their place. The softmax of all
// classes is written first, then the few that are labels.
template <typename T, int K>
__global__ void __launch_bounds__(kThreads, K <= 19 ? 2 : 1) gradient_kernel(
    const Bcl call, const BclSaved saved, const View gradient) {
  const Patch patch(call);
  const Target target{call, patch.image};
  const int classes = static_cast<int>(call.logits.channels);
  const float factor = *saved.grad;
  const float of_ce = call.options.ce_weight * saved.scales[0];
  const float of_boundary = call.options.boundary_weight * saved.scales[1];
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t at = (patch.image * call.target.height + y) * call.target.width + patch.x;
    T* const to = static_cast<T*>(gradient.data) + offset_of(gradient, patch.image, 0, y, patch.x);
    const Labels labels = target.of_term(y, patch.x);
    Amounts<float> amounts{};
    if (labels.own >= 0) amounts = amounts_of(call, labels, saved.mask[at], of_ce, of_boundary);
    const Full<T> logits(call, patch.image, y, patch.x);
    const bool counts = amounts.total != 0 && classes > 1;
    float z[K], best = -kInfinity;
    logits.template read<K>(0, classes, z);
#pragma unroll
    for (int i = 0; i < K; ++i) best = fmaxf(best, z[i]);
    for (int c = K; c < classes; ++c) best = fmaxf(best, logits(c));
    const float shift = Softmax<K>::shift_of(best), scale = amounts.total * exp2_of(-kLog2E * saved.lse[at]);
    const auto of_label = [&](int label) {
      float g = scale * exp2_of(exponent(logits(label), shift)) - amounts.own * (label == labels.own);
      g -= amounts.rows * (label == labels.rows) + amounts.columns * (label == labels.columns);
      return factor * g;
    };
    const bool has_rows = counts && amounts.rows != 0, has_columns = counts && amounts.columns != 0;
    const float own = counts ? of_label(labels.own) : 0.0f, rows = has_rows ? of_label(labels.rows) : 0.0f;
    const float columns = has_columns ? of_label(labels.columns) : 0.0f;
    for (int first = 0; first < classes; first += K) {
      if (first > 0) logits.template read<K>(first, classes, z);
      T* next = to + first * gradient.channel_stride;
#pragma unroll
      for (int i = 0; i < K; ++i, next += gradient.channel_stride) {
        const float g = factor * (scale * exp2_of(exponent(z[i], shift)));
        if (first + i < classes) store(next, counts ? g : 0.0f);
      }
    }
    if (counts) store(to + labels.own * gradient.channel_stride, own);
    if (has_rows) store(to + labels.rows * gradient.channel_stride, rows);
    if (has_columns) store(to + labels.columns * gradient.channel_stride, columns);
  }
}

// Two neighbouring pixels of a lane, whose logits stay in registers: of K classes exactly where these are Cityscapes',
// else of at most so many, of which kGroup at a time are left out. Half as many instructions read and write them, and
// 16-bit ones fill the 128 bytes that a warp moves at once.
constexpr int kExactly = 19;
constexpr int kGroup = 4;

template <typename T, int K, bool kPacked>
struct Pair {
  using Both = Pack<T, 2>;
  static constexpr bool kExact = K == kExactly;
  const T* const from;
  const int64_t stride, to_right;
  const int classes;
  float z[2][K], shift[2];

  __device__ Pair(const Bcl& call, int64_t image, int y, int x)
      : from(static_cast<const T*>(call.logits.data) + offset_of(call.logits, image, 0, y, x)),
        stride(call.logits.channel_stride), to_right(call.logits.column_stride),
        classes(kExact ? K : static_cast<int>(call.logits.channels)) {
    const T* next = from;
    if constexpr (kPacked) {
      each_class([&](int i) {
        const Both both = Both::load(next);
        z[0][i] = as_float(both.value[0]), z[1][i] = as_float(both.value[1]), next += stride;
      });
    } else {
      each_class([&](int i) { z[0][i] = as_float(*next), z[1][i] = as_float(next[to_right]), next += stride; });
    }
  }
  // Calls body(i) for each class.
  template <typename Body>
  __device__ void each_class(const Body& body) const {
#pragma unroll
    for (int first = 0; first < K; first += kGroup) {
      if (!kExact && first >= classes) continue;
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (first + i < K && (kExact || first + i < classes)) body(first + i);
    }
  }
  // Of a pixel: max z, and by what exponents are shifted.
  __device__ float find_best(int pixel) {
    float best = -kInfinity;
    each_class([&](int i) { best = fmaxf(best, z[pixel][i]); });
    shift[pixel] = Softmax<K>::shift_of(best);
    return best;
  }
  __device__ float exponential(int pixel, int i) const { return exp2_of(exponent(z[pixel][i], shift[pixel])); }
  // The exponent of a label, which is absent below 0.
  __device__ float exponent_of(int pixel, int label) const {
    return exponent(as_float(from[max(label, 0) * stride + pixel * to_right]), shift[pixel]);
  }
};

// The nearest elements, in one conversion.
template <typename T>
__device__ Pack<T, 2> both_of(float x, float y);
template <>
__device__ inline Pack<float, 2> both_of<float>(float x, float y) { return {{x, y}}; }
template <>
__device__ inline Pack<__half, 2> both_of<__half>(float x, float y) {
  const __half2 both = __floats2half2_rn(x, y);
  return {{both.x, both.y}};
}
template <>
__device__ inline Pack<__nv_bfloat16, 2> both_of<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return {{both.x, both.y}};
}

// The pixels of a block, where each half of its threads has half of the rows, and each lane two columns.
struct Pairs : Patch {
  __device__ explicit Pairs(const Bcl& call) : Patch(call) {
    constexpr int kLanes = kThreads / 2;
    const int half = static_cast<int>(threadIdx.x) / kLanes, column = 2 * (static_cast<int>(threadIdx.x) % kLanes);
    begin += half * (kRows / 2), end = half == 0 ? min(end, begin + kRows / 2) : end;
    x = static_cast<int>(blockIdx.y) * kThreads + column, inside = x < call.target.width;
  }
};

template <typename T, int K, bool kPacked>
__global__ void __launch_bounds__(kThreads, K <= 19 && kPacked && sizeof(T) == 2 ? 3 : 2) score_pairs_kernel(
    const Bcl call, const Scratch scratch) {
  using Floats = Pack<float, 2>;
  using TwoScores = Pack<uint16_t, 2>;
  const Pairs patch(call);
  const float nats = nats_of(call.logits.channels);
  float ces = 0, scores = 0;
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t row = patch.image * call.target.height + y, at = row * call.target.width + patch.x;
    uint16_t* const at_score = scratch.score + row * scratch.score_pitch + patch.x;
    const TwoScores words = TwoScores::load(at_score);
    Pair<T, K, kPacked> pair(call, patch.image, y, patch.x);
    TwoScores score{};
    Floats best{}, lse{}, term{};
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      const Labels labels = Narrow::unpacked(words.value[pixel]);
      if (labels.own < 0) continue;
      best.value[pixel] = pair.find_best(pixel);
      float sum = 0;
      pair.each_class([&](int i) { sum += pair.exponential(pixel, i); });
      const float log_sum = log2_of(sum), weight = class_weight_of(call, labels.own);
      const CrossEntropies ce = CrossEntropies::of_all(labels, [&](int label) {
        return cross_entropy(nats, log_sum, pair.exponent_of(pixel, label));
      });
      const float s = ce.sum(call.options.score);
      lse.value[pixel] = kLn2 * log_sum, ces += times_weight(weight, ce.own), scores += s;
      score.value[pixel] = on_grid_of(s), term.value[pixel] = times_weight(weight, ce.sum(call.options.terms));
    }
    if (scratch.best) best.store_to(scratch.best + at);
    if (scratch.lse) lse.store_to(scratch.lse + at);
    if (!selects(call)) continue;
    score.store_to(at_score);
    if (scratch.term) term.store_to(scratch.term + at);
  }
  write_scored(ces, isnan(scores) ? kNan : 0, scratch.scored + block_number());
}

// As gradient_kernel.
template <typename T, int K, bool kPacked>
__global__ void __launch_bounds__(kThreads, K <= 19 && kPacked ? 2 : 1) gradient_pairs_kernel(
    const Bcl call, const BclSaved saved, const View gradient) {
  const Pairs patch(call);
  const Target target{call, patch.image};
  const float factor = *saved.grad;
  const float of_ce = call.options.ce_weight * saved.scales[0];
  const float of_boundary = call.options.boundary_weight * saved.scales[1];
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t at = (patch.image * call.target.height + y) * call.target.width + patch.x;
    T* const to = static_cast<T*>(gradient.data) + offset_of(gradient, patch.image, 0, y, patch.x);
    Pair<T, K, kPacked> pair(call, patch.image, y, patch.x);
    Labels labels[2];
    float scale[2], of_label[2][3];
    bool counts[2], has_rows[2], has_columns[2];
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      const Labels own = labels[pixel] = target.of_term(y, patch.x + pixel);
      Amounts<float> amounts{};
      if (own.own >= 0) amounts = amounts_of(call, own, saved.mask[at + pixel], of_ce, of_boundary);
      counts[pixel] = amounts.total != 0 && pair.classes > 1;
      has_rows[pixel] = counts[pixel] && amounts.rows != 0, has_columns[pixel] = counts[pixel] && amounts.columns != 0;
      pair.find_best(pixel);
      const float part = amounts.total * exp2_of(-kLog2E * saved.lse[at + pixel]);
      scale[pixel] = factor * part;
      const auto value_of_label = [&](int label) {
        float g = part * exp2_of(pair.exponent_of(pixel, label)) - amounts.own * (label == own.own);
        g -= amounts.rows * (label == own.rows) + amounts.columns * (label == own.columns);
        return factor * g;
      };
      of_label[pixel][0] = counts[pixel] ? value_of_label(own.own) : 0.0f;
      of_label[pixel][1] = has_rows[pixel] ? value_of_label(own.rows) : 0.0f;
      of_label[pixel][2] = has_columns[pixel] ? value_of_label(own.columns) : 0.0f;
    }
    T* next = to;
    const auto value_of = [&](int pixel, int i) {
      return counts[pixel] ? scale[pixel] * pair.exponential(pixel, i) : 0.0f;
    };
    if constexpr (kPacked) {
      pair.each_class([&](int i) {
        both_of<T>(value_of(0, i), value_of(1, i)).store_to(next), next += gradient.channel_stride;
      });
    } else {
      pair.each_class([&](int i) {
        store(next, value_of(0, i)), store(next + gradient.column_stride, value_of(1, i));
        next += gradient.channel_stride;
      });
    }
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      const auto put = [&](bool there, int label, float value) {
        if (there) store(to + label * gradient.channel_stride + pixel * gradient.column_stride, value);
      };
      put(counts[pixel], labels[pixel].own, of_label[pixel][0]);
      put(has_rows[pixel], labels[pixel].rows, of_label[pixel][1]);
      put(has_columns[pixel], labels[pixel].columns, of_label[pixel][2]);
    }
  }
}

bool has_pairs(const View& map) { return map.channels <= kMostClasses && map.width % 2 == 0; }

// Whether both pixels are moved at once: what is written does not depend on it.
bool are_packed(const View& map) {
  const int64_t bytes = map.dtype == DType::kFloat32 ? 8 : 4;
  return map.column_stride == 1 && map.row_stride % 2 == 0 && map.channel_stride % 2 == 0 &&
         map.batch_stride % 2 == 0 && reinterpret_cast<uintptr_t>(map.data) % bytes == 0;
}

// Returns launch(K, packed) of the classes that a pair has.
template <typename Launch>
int by_pairs(int64_t classes, bool packed, Launch launch) {
  const auto of_classes = [&](auto k) { return packed ? launch(k, std::true_type()) : launch(k, std::false_type()); };
  if (classes == kExactly) return of_classes(std::integral_constant<int, kExactly>());
  return of_classes(std::integral_constant<int, kMostClasses>());
}

}  // namespace

int launch_full_scores(const Bcl& call, const Scratch& scratch, void* stream) {
  return dispatch_float(call.logits.dtype, [&](auto zero) {
    if (has_pairs(call.logits)) {
      return by_pairs(call.logits.channels, are_packed(call.logits), [&](auto k, auto packed) {
        const auto kernel = score_pairs_kernel<decltype(zero), decltype(k)::value, decltype(packed)::value>;
        BCM_LAUNCH(kernel, pixel_grid(call), kThreads, 0, stream, call, scratch);
        return static_cast<int>(cudaGetLastError());
      });
    }
    return by_classes(call.logits.channels, [&](auto k) {
      using Logits = Full<decltype(zero)>;
      BCM_LAUNCH(
          (score_pixels_kernel<Logits, decltype(k)::value>), pixel_grid(call), kThreads, 0, stream, call, scratch);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

}  // namespace bcmfnet

extern "C" int bcl_backward_cuda(
    const bcmfnet::Bcl* call, const bcmfnet::BclSaved* saved, const bcmfnet::View* gradient, void* stream) {
  using namespace bcmfnet;
  if (call->logits.batch == 0) return cudaSuccess;
  if (has_terms(*call)) return launch_term_gradient(*call, *saved, *gradient, stream);
  return dispatch_float(call->logits.dtype, [&](auto zero) {
    if (has_pairs(call->logits)) {
      const bool are = are_packed(call->logits) && are_packed(*gradient);
      return by_pairs(call->logits.channels, are, [&](auto k, auto packed) {
        const auto kernel = gradient_pairs_kernel<decltype(zero), decltype(k)::value, decltype(packed)::value>;
        BCM_LAUNCH(kernel, pixel_grid(*call), kThreads, 0, stream, *call, *saved, *gradient);
        return static_cast<int>(cudaGetLastError());
      });
    }
    return by_classes(call->logits.channels, [&](auto k) {
      BCM_LAUNCH(
          (gradient_kernel<decltype(zero), decltype(k)::value>), pixel_grid(*call), kThreads, 0, stream, *call, *saved,
          *gradient);
      return static_cast<int>(cudaGetLastError());
    });
  });
}
