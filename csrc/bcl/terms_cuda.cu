// The room of terms at the pixels: scores at full resolution and of many classes, and the gradient at full resolution.
#include "bcl/terms_cuda.h"

#include "bcl/bcl_cuda.h"

namespace bcmfnet {
namespace {

// Whether logits of a type may be low-resolution ones, which are float32, of many classes.
template <typename T, bool kWide>
constexpr bool kMayLerp = kWide && std::is_same<T, float>::value;

// Cross-entropy, score and losses of each pixel; of up to kMostClasses also the sums of overlap.
template <typename T, int K, bool kWide>
__global__ void __launch_bounds__(kThreads, K <= 19 ? 2 : 1) term_scores_kernel(const Bcl call, const Scratch scratch) {
  BCM_DYNAMIC_SHARED(float, shared);
  const Patch patch(call);
  const TargetOf<true> target{call, patch.image};
  const int classes = static_cast<int>(classes_of(call));
  const bool tallies = !kWide && has_overlap(call.options);
  Tally tally(shared, tallies ? classes : 0);
  float predicted[kWide ? 1 : K] = {};
  Losses losses;
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t row = patch.image * call.target.height + y, at = row * call.target.width + patch.x;
    const int64_t at_score = row * scratch.score_pitch + patch.x;
    const Labels labels = kWide ? Wide::unpacked(scratch.labels[at_score]) : Narrow::unpacked(scratch.score[at_score]);
    const float u = target.weight(y, patch.x);
    const bool distilled = is_distilled(call, labels, u);
    const auto logits = sampled<T, kMayLerp<T, kWide>>(call, call.logits, patch.image, y, patch.x);
    Scored scored{};
    float best = 0, log_sum = 0, student_log_sum = 0, teacher_best = 0, teacher_log_sum = 0;
    if (labels.own >= 0 || distilled) {
      const Softmax<K> softmax(logits, classes);
      best = softmax.best, log_sum = log2f(softmax.sum);
      const auto exponent_of = [&](int label) { return exponent(logits(label), softmax.shift); };
      if (labels.own >= 0)
        scored = score_of(call, labels, u, u * weight_of_class(call, labels.own), log_sum, exponent_of, losses);
      if (tallies && labels.own >= 0) {
        float z[K];
        logits.template read<K>(0, classes, z);
        const float scale = u * exp2_of(-log_sum);
#pragma unroll
        for (int i = 0; !kWide && i < K; ++i)
          predicted[i] = fmaf(scale, exp2_of(exponent(z[i], softmax.shift)), predicted[i]);
        tally.take(labels.own, u, exp2_of(exponent_of(labels.own) - log_sum));
      }
    }
    if (distilled) {
      const auto teacher = sampled<AnyFloat, true>(call, call.teacher, patch.image, y, patch.x);
      teacher_best = largest_of(call, teacher);
      const auto student = Tempered::of(call, logits, best), taught = Tempered::of(call, teacher, teacher_best);
      student_log_sum = student.log_sum, teacher_log_sum = taught.log_sum;
      losses.distillation += u * divergence(call, student, logits, taught, teacher);
    }
    if (scratch.best) scratch.best[at] = best;
    if (scratch.lse) scratch.lse[at] = kLn2 * log_sum;
    if (scratch.student_lse) {
      scratch.student_lse[at] = student_log_sum;
      scratch.teacher_best[at] = teacher_best, scratch.teacher_lse[at] = teacher_log_sum;
    }
    if (!selects(call)) continue;
    scratch.score[at_score] = scored.score, scratch.term[at] = scored.term;
  }
  const int64_t block = block_number();
  write_scored(losses.ce, losses.flags, scratch.scored + block);
  write_terms({0, 0, losses.spread, losses.focal, losses.distillation}, scratch.scored_terms + block);
  if (!tallies) return;
  if constexpr (!kWide) tally.fold(predicted);
  tally.write(scratch.overlap + 3 * block * classes, classes);
}

// The sums of overlap of a group of the classes, with max z and log-sum-exp from maps.
template <typename T>
__global__ void __launch_bounds__(kThreads) tally_kernel(const Bcl call, const Scratch scratch) {
  BCM_DYNAMIC_SHARED(float, shared);
  const Patch patch(call);
  const TargetOf<true> target{call, patch.image};
  const int all = static_cast<int>(classes_of(call)), first = static_cast<int>(blockIdx.z) * kMostClasses;
  Tally tally(shared, min(all - first, kMostClasses));
  float predicted[kMostClasses] = {};
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t row = patch.image * call.target.height + y, at = row * call.target.width + patch.x;
    const int own = Wide::unpacked(scratch.labels[row * scratch.score_pitch + patch.x]).own;
    if (own < 0) continue;
    const auto logits = sampled<T, kMayLerp<T, true>>(call, call.logits, patch.image, y, patch.x);
    const float u = target.weight(y, patch.x), log_sum = kLog2E * scratch.lse[at];
    const float shift = Softmax<1>::shift_of(scratch.best[at]), scale = u * exp2_of(-log_sum);
    float z[kMostClasses];
    logits.template read<kMostClasses>(first, all, z);
#pragma unroll
    for (int i = 0; i < kMostClasses; ++i) predicted[i] = fmaf(scale, exp2_of(exponent(z[i], shift)), predicted[i]);
    const bool held = own >= first && own < first + kMostClasses;
    if (held) tally.take(own - first, u, exp2_of(exponent(logits(own), shift) - log_sum));
  }
  tally.fold(predicted);
  tally.write(scratch.overlap + 3 * block_number() * all + first, all);
}

// The sum of p by the slopes of overlap, of each pixel, for the gradient of cells of a group of the classes.
__global__ void __launch_bounds__(kThreads, 2) inner_kernel(const Bcl call, const Scratch scratch) {
  const Patch patch(call);
  const Shares shares(call, scratch.factors->scales, scratch.slopes, patch.image);
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t row = patch.image * call.target.height + y, at = row * call.target.width + patch.x;
    const auto logits = sampled<float, true>(call, call.logits, patch.image, y, patch.x);
    const float shift = Softmax<1>::shift_of(scratch.best[at]);
    float sum = 0;
    if (Wide::unpacked(scratch.labels[row * scratch.score_pitch + patch.x]).own >= 0)
      for (int c = 0; c < call.logits.channels; ++c)
        sum = fmaf(shares.slopes[c], exp2_of(exponent(logits(c), shift)), sum);
    scratch.inner[at] = sum * exp2_of(-kLog2E * scratch.lse[at]);
  }
}

// A thread reads all logits of its pixel before it writes them, or what comes before them: the gradient may take their
// place. That of all classes is written first, then the few that are labels.
template <typename T, int K, bool kWide>
__global__ void __launch_bounds__(kThreads, K <= 19 ? 2 : 1) term_gradient_kernel(
    const Bcl call, const BclSaved saved, const View gradient) {
  const Patch patch(call);
  const TargetOf<true> target{call, patch.image};
  const int classes = static_cast<int>(classes_of(call)), absent = classes_before_channels(call);
  const Shares shares(call, saved.scales, saved.slopes, patch.image);
  const float factor = *saved.grad;
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t at = (patch.image * call.target.height + y) * call.target.width + patch.x;
    T* const to = static_cast<T*>(gradient.data) + offset_of(gradient, patch.image, 0, y, patch.x);
    const bool selected = saved.mask[at];
    Labels labels{target.known(target.read(y, patch.x)), -1, -1};
    if (selected) labels = target.of_term(y, patch.x);
    const float u = target.weight(y, patch.x), log_sum = kLog2E * saved.lse[at];
    const auto logits = sampled<T, false>(call, call.logits, patch.image, y, patch.x);
    float z[K], best = -kInfinity;
    const int chunks = kWide ? classes : 1;
    for (int first = 0; first < chunks; first += K) {
      logits.template read<K>(first, classes, z);
#pragma unroll
      for (int i = 0; i < K; ++i) best = fmaxf(best, z[i]);
    }
    const float shift = Softmax<K>::shift_of(best);
    const auto p_of = [&](float of) { return exp2_of(exponent(of, shift) - log_sum); };
    float inner = 0;
    for (int first = 0; shares.slopes != nullptr && first < chunks; first += K) {
      if (kWide) logits.template read<K>(first, classes, z);
#pragma unroll
      for (int i = 0; i < K; ++i)
        if (first + i < classes) inner = fmaf(shares.slopes[first + i], p_of(z[i]), inner);
    }
    const float weight = labels.own >= 0 ? u * weight_of_class(call, labels.own) : 0.0f;
    const PixelGradient pixel(call, shares, labels, u, weight, selected, inner, [&](int label) {
      return exponent(logits(label), shift) - log_sum;
    });
    const auto of_class = [&](int c, float of) {
      const float slope = shares.slopes != nullptr ? pixel.overlap * shares.slopes[c] : 0.0f;
      float g = pixel.counts ? p_of(of) * (pixel.amounts.total + slope) : 0.0f;
      if (pixel.spread != 0) g -= pixel.spread * weight_of_class(call, c);
      return g;
    };
    const auto write = [&](auto distilled, auto write_all) {
      const auto of_label = [&](int label) {
        float g = of_class(label, logits(label)) + distilled(label, logits(label));
        g -= pixel.amounts.own * (label == labels.own) + pixel.amounts.rows * (label == labels.rows);
        return factor * (g - pixel.amounts.columns * (label == labels.columns));
      };
      const auto put = [&](int label, float g) {
        if (label >= absent) store(to + (label - absent) * gradient.channel_stride, g);
      };
      const bool has_rows = pixel.amounts.rows != 0, has_columns = pixel.amounts.columns != 0;
      const float own = pixel.counts ? of_label(labels.own) : 0.0f, rows = has_rows ? of_label(labels.rows) : 0.0f;
      const float columns = has_columns ? of_label(labels.columns) : 0.0f;
      write_all(put);
      if (pixel.counts) put(labels.own, own);
      if (has_rows) put(labels.rows, rows);
      if (has_columns) put(labels.columns, columns);
    };
    if (pixel.distillation != 0) {
      const auto teacher = sampled<AnyFloat, true>(call, call.teacher, patch.image, y, patch.x);
      const auto student = Tempered::of(call, logits, best);
      const auto taught = Tempered::of(call, teacher, largest_of(call, teacher));
      const auto distilled = [&](int c, float of) {
        return pixel.distillation * (exp2_of(student(of)) - exp2_of(taught(teacher(c))));
      };
      write(distilled, [&](auto put) {
        for (int c = 0; c < classes; ++c) put(c, factor * (of_class(c, logits(c)) + distilled(c, logits(c))));
      });
    } else {
      write([](int, float) { return 0.0f; }, [&](auto) {
        for (int first = 0; first < chunks; first += K) {
          if (kWide) logits.template read<K>(first, classes, z);
          T* next = to + (first - absent) * gradient.channel_stride;
#pragma unroll
          for (int i = 0; i < K; ++i, next += gradient.channel_stride)
            if (first + i < classes && first + i >= absent) store(next, factor * of_class(first + i, z[i]));
        }
      });
    }
  }
}

}  // namespace

int launch_term_scores(const Bcl& call, const Scratch& scratch, void* stream) {
  return dispatch_float(call.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool tallies = has_overlap(call.options);
    BCM_TRY(by_classes_of_terms(call, [&](auto k, auto wide) {
      constexpr bool kWide = decltype(wide)::value;
      const int bytes = !kWide && tallies ? Tally::bytes(static_cast<int>(classes_of(call)), kThreads) : 0;
      return launch_with_shared(
          term_scores_kernel<T, decltype(k)::value, kWide>, pixel_grid(call), kThreads, bytes, stream, call, scratch);
    }));
    if (!is_wide(call) || !tallies) return 0;
    dim3 grid = pixel_grid(call);
    grid.z = blocks_for(call.logits.channels, kMostClasses);
    const int bytes = Tally::bytes(kMostClasses, kThreads);
    return launch_with_shared(tally_kernel<T>, grid, kThreads, bytes, stream, call, scratch);
  });
}

int launch_inner(const Bcl& call, const Scratch& scratch, void* stream) {
  BCM_LAUNCH(inner_kernel, pixel_grid(call), kThreads, 0, stream, call, scratch);
  return cudaGetLastError();
}

int launch_term_gradient(const Bcl& call, const BclSaved& saved, const View& gradient, void* stream) {
  return dispatch_float(call.logits.dtype, [&](auto zero) {
    return by_classes_of_terms(call, [&](auto k, auto wide) {
      BCM_LAUNCH(
          (term_gradient_kernel<decltype(zero), decltype(k)::value, decltype(wide)::value>), pixel_grid(call), kThreads,
          0, stream, call, saved, gradient);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

}  // namespace bcmfnet
