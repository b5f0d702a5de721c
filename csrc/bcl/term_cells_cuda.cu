// The room of terms at cells of low-resolution logits: scores of up to kMostClasses, and the gradient.
#include "bcl/cells_cuda.h"
#include "bcl/terms_cuda.h"

namespace bcmfnet {
namespace {

// The rows of output pixels that the warps of a block take one after the other, and the pixels of a lane in its row.
struct Walk {
  const Bcl& call;
  const bool align;
  const Place place;
  const Source column;  // of the lane's cell

  __device__ explicit Walk(const Bcl& call)
      : call(call), align(call.options.align_corners), place(call, align),
        column{place.inside ? place.cell : 0, place.inside ? place.cell + place.has_right : 0, 0.0f} {}

  __device__ Source row(int y) const {
    const float weight = lerp_weight(y, place.row, call.logits.height, call.target.height, align);
    return {place.row, place.row + place.has_below, place.has_below ? weight : 0.0f};
  }
  __device__ Sampled<float, true> corners(const Source& row) const {
    return {call, call.logits, place.image, row, column};
  }
  // Calls visit(x, weight) with the weight of the right source column: lerp_weight, one column after the other.
  template <typename Visit>
  __device__ void each(Visit visit) const {
    const Positions positions = positions_of(call.logits.width, call.target.width, align);
    const float per_step = 1 / static_cast<float>(positions.divisor);
    const int step = place.has_right ? static_cast<int>(positions.step) : 0;
    const int64_t first = positions.first + positions.step * place.begin_x - positions.divisor * place.cell;
    int ahead = place.has_right ? static_cast<int>(first) : 0;
    for (int x = place.begin_x; x < place.end_x; ++x, ahead += step)
      visit(x, ahead > 0 ? static_cast<float>(ahead) * per_step : 0.0f);
  }
};

// Logits of a pixel between those that a lane holds at its two source columns.
template <int K>
struct Held {
  const CellRows<K>& rows;
  int lane;
  float weight_x;

  __device__ float operator()(int c) const {
    return fmaf(weight_x, rows.step[c * kCells + lane], rows.left[c * kCells + lane]);
  }
};

// Logits of the teacher at a pixel; its cells are those of the logits where it has their size.
__device__ Sampled<AnyFloat, true> teacher_at(const Walk& walk, const Source& row, int y, int x, float weight_x) {
  const Bcl& call = walk.call;
  if (call.teacher.height != call.logits.height || call.teacher.width != call.logits.width)
    return sampled<AnyFloat, true>(call, call.teacher, walk.place.image, y, x);
  return {call, call.teacher, walk.place.image, row, {walk.column.low, walk.column.high, weight_x}};
}

// Cross-entropy, score, losses and sums of overlap of each pixel.
template <int K>
__global__ void __launch_bounds__(kWarps * 32, K <= 19 ? 3 : 2) cell_scores_kernel(
    const Bcl call, const Scratch scratch) {
  BCM_DYNAMIC_SHARED(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, classes = static_cast<int>(classes_of(call));
  CellRows<K> rows(shared, classes);
  const Walk walk(call);
  const Place& place = walk.place;
  const TargetOf<true> target{call, place.image};
  const bool tallies = has_overlap(call.options);
  Tally tally(rows.sum, rows.right, tallies ? classes : 0);
  // A cell may have thousands of columns: a float adds up those of one row alone.
  __shared__ double sums_of_threads[kWarps * 32][4];
  double* const sums = sums_of_threads[threadIdx.x];
  for (int i = 0; i < 4; ++i) sums[i] = 0;
  unsigned flags = 0;
  for (int y = place.begin + warp; y < place.end; y += kWarps) {
    const Source source_row = walk.row(y);
    rows.interpolate(walk.corners(source_row), 0, lane);
    float left[K], step[K], predicted[K] = {};
#pragma unroll
    for (int i = 0; i < K; ++i) {
      left[i] = i < classes ? rows.left[i * kCells + lane] : -kInfinity;
      step[i] = i < classes ? rows.step[i * kCells + lane] : 0.0f;
    }
    const int64_t row = place.image * call.target.height + y;
    Losses losses;
    walk.each([&](int x, float weight_x) {
      uint16_t& label_or_score = scratch.score[row * scratch.score_pitch + x];
      const Labels labels = Narrow::unpacked(label_or_score);
      const float u = target.weight(y, x);
      const Held<K> logits{rows, lane, weight_x};
      Scored scored{};
      if (labels.own >= 0) {
        float z[K];
#pragma unroll
        for (int i = 0; i < K; ++i) z[i] = fmaf(weight_x, step[i], left[i]);
        const Normalizer softmax = exponentiate(z);
        scored = score_of(call, labels, u, softmax.log_sum, softmax.shift, logits, losses);
        if (tallies) {
          const float scale = u * softmax.scale;
#pragma unroll
          for (int i = 0; i < K; ++i) predicted[i] = fmaf(scale, z[i], predicted[i]);
          const float p = softmax.scale * exp2_of(exponent(logits(labels.own), softmax.shift));
          tally.take(labels.own, u, p);
        }
      }
      if (is_distilled(call, labels, u)) {
        const auto teacher = teacher_at(walk, source_row, y, x, weight_x);
        const auto student = Tempered::of(call, logits, largest_of(call, logits));
        const auto taught = Tempered::of(call, teacher, largest_of(call, teacher));
        losses.distillation += u * divergence(call, student, logits, taught, teacher);
      }
      if (!selects(call)) return;
      label_or_score = scored.score, scratch.term[row * call.target.width + x] = scored.term;
    });
    sums[0] += losses.ce, sums[1] += losses.spread, sums[2] += losses.focal, sums[3] += losses.distillation;
    flags |= losses.flags;
    if (tallies) tally.fold(predicted);
  }
  const int64_t block = block_number();
  write_scored(sums[0], flags, scratch.scored + block);
  write_terms({0, 0, sums[1], sums[2], sums[3]}, scratch.scored_terms + block);
  if (tallies) tally.write(scratch.overlap + 3 * block * classes, classes);
}

// The gradient of all terms, of all classes or of a group of them; of a group what a pixel has of all is in maps.
template <int K, bool kWide>
__global__ void __launch_bounds__(kWarps * 32, 2) cell_gradient_kernel(const Bcl call, const Scratch scratch) {
  constexpr int kHeld = K <= 19 ? K : 1;  // steps in registers: all of 31 would not fit
  BCM_DYNAMIC_SHARED(float, shared);
  __shared__ float weights_y[kWarps], slopes[K];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, all = static_cast<int>(classes_of(call));
  const int first_class = kWide ? static_cast<int>(blockIdx.z) * K : 0, classes = min(K, all - first_class);
  CellRows<K> rows(shared, classes);
  const Walk walk(call);
  const Place& place = walk.place;
  const TargetOf<true> target{call, place.image};
  const Shares shares(call, scratch.factors->scales, scratch.slopes, place.image);
  if (threadIdx.x < K) {
    const bool has = shares.slopes != nullptr && threadIdx.x < classes;
    slopes[threadIdx.x] = has ? shares.slopes[first_class + threadIdx.x] : 0.0f;
  }
  rows.clear_block();
  __syncthreads();

  for (int first_row = place.begin; first_row < place.end; first_row += kWarps) {
    const int y = first_row + warp;
    if (y < place.end) {
      rows.clear_row(lane);
      const Source source_row = walk.row(y);
      if (lane == 0) weights_y[warp] = source_row.weight;
      rows.interpolate(walk.corners(source_row), first_class, lane);
      float left[K], step[kHeld], sum[K] = {}, right[K] = {}, spread = 0, spread_right = 0;
#pragma unroll
      for (int i = 0; i < K; ++i) {
        left[i] = i < classes ? rows.left[i * kCells + lane] : -kInfinity;
        if (i < kHeld) step[i] = i < classes ? rows.step[i * kCells + lane] : 0.0f;
      }
      const int64_t pixel_row = place.image * call.target.height + y;
      walk.each([&](int x, float weight_x) {
        const int64_t at = pixel_row * call.target.width + x;
        Labels labels{target.known(target.read(y, x)), -1, -1};
        const float u = target.weight(y, x);
        if (labels.own < 0 && !is_distilled(call, labels, u)) return;
        const bool selected = labels.own >= 0 && is_selected(call, scratch, place.image, y, x);
        if (selected) labels = target.of_term(y, x);
        float z[K], inner = 0;
#pragma unroll
        for (int i = 0; i < K; ++i)
          z[i] = fmaf(weight_x, i < kHeld ? step[i] : i < classes ? rows.step[i * kCells + lane] : 0.0f, left[i]);
        Normalizer softmax;
        if constexpr (kWide) {
          softmax.shift = Softmax<K>::shift_of(scratch.best[at]), softmax.log_sum = kLog2E * scratch.lse[at];
          softmax.scale = exp2_of(-softmax.log_sum);
#pragma unroll
          for (int i = 0; i < K; ++i) z[i] = exp2_of(exponent(z[i], softmax.shift));
          if (shares.slopes != nullptr) inner = scratch.inner[at];
        } else {
          softmax = exponentiate(z);
#pragma unroll
          for (int i = 0; i < K; ++i) inner = fmaf(slopes[i], z[i], inner);
          inner *= softmax.scale;
        }
        const Held<K> held{rows, lane, weight_x};
        const auto logit = [&](int label) {
          if constexpr (!kWide) return held(label);
          // The label may be of another group of classes, which this block does not hold.
          return Sampled<float, true>(
              call, call.logits, place.image, source_row, {walk.column.low, walk.column.high, weight_x})(label);
        };
        const PixelGradient pixel(
            call, shares, labels, u, selected, softmax.log_sum, softmax.shift, inner, logit);
        const auto take = [&](int label, float amount) {
          const int i = label - first_class;
          if (amount != 0 && i >= 0 && i < classes) rows.take(i, lane, weight_x, amount);
        };
        if (pixel.counts) {
          const float each = pixel.amounts.total * softmax.scale, sloped = pixel.overlap * softmax.scale;
#pragma unroll
          for (int i = 0; i < K; ++i) {
            const float g = z[i] * fmaf(sloped, slopes[i], each);
            sum[i] += g, right[i] = fmaf(weight_x, g, right[i]);
          }
          spread += pixel.spread, spread_right = fmaf(weight_x, pixel.spread, spread_right);
          take(labels.own, pixel.amounts.own), take(labels.rows, pixel.amounts.rows);
          take(labels.columns, pixel.amounts.columns);
        }
        if (pixel.distillation != 0) {
          const auto teacher = teacher_at(walk, source_row, y, x, weight_x);
          Tempered student(call, 0, 0), taught(call, 0, 0);
          if constexpr (kWide) {
            student = Tempered(call, scratch.best[at], scratch.student_lse[at]);
            taught = Tempered(call, scratch.teacher_best[at], scratch.teacher_lse[at]);
          } else {
            student = Tempered::of(call, held, largest_of(call, held));
            taught = Tempered::of(call, teacher, largest_of(call, teacher));
          }
          for (int i = 0; i < classes; ++i) {
            const float ahead = exp2_of(student(held(i))) - exp2_of(taught(teacher(first_class + i)));
            rows.take(i, lane, weight_x, -pixel.distillation * ahead);
          }
        }
      });
#pragma unroll
      for (int i = 0; i < K; ++i) {
        if (i >= classes) continue;
        const float weight = spread != 0 ? weight_of_class(call, first_class + i) : 0.0f;
        rows.sum[i * kCells + lane] += sum[i] - spread * weight;
        rows.right[i * kCells + lane] += right[i] - spread_right * weight;
      }
    }
    __syncthreads();
    rows.fold(weights_y, min(kWarps, place.end - first_row));
    __syncthreads();
  }
  const int absent = first_class == 0 ? classes_before_channels(call) : 0;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  const int64_t at = (block * call.logits.channels + first_class - absent) * kNodes;
  for (int i = absent * kNodes + threadIdx.x; i < classes * kNodes; i += blockDim.x)
    scratch.upper[at + i] = rows.upper[i], scratch.lower[at + i] = rows.lower[i];
}

int shared_of(int classes) { return 4 * classes * (4 * kWarps * kCells + 2 * kNodes); }

}  // namespace

int launch_cell_scores(const Bcl& call, const Scratch& scratch, void* stream) {
  if (is_wide(call)) return launch_term_scores(call, scratch, stream);
  const int classes = static_cast<int>(classes_of(call));
  return by_classes_of_terms(call, [&](auto k, auto) {
    return launch_with_shared(
        cell_scores_kernel<decltype(k)::value>, cell_grid(call), kWarps * 32, shared_of(classes), stream, call,
        scratch);
  });
}

int launch_cell_gradient(const Bcl& call, const Scratch& scratch, void* stream) {
  if (is_wide(call) && has_overlap(call.options)) BCM_TRY(launch_inner(call, scratch, stream));
  return by_classes_of_terms(call, [&](auto k, auto wide) {
    constexpr int K = decltype(k)::value;
    const int64_t classes = smaller_of<int64_t>(classes_of(call), K);
    return launch_with_shared(
        cell_gradient_kernel<K, decltype(wide)::value>, cell_grid(call), kWarps * 32,
        shared_of(static_cast<int>(classes)), stream, call, scratch);
  });
}

}  // namespace bcmfnet
