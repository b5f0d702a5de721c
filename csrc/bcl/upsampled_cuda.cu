// The room of upsampled logits. What is done at a pixel of a cell is a Pass.
#include "bcl/cells_cuda.h"

namespace bcmfnet {
namespace {

// Logits between four source pixels.
struct Lerped {
  const float *top, *bottom;
  int64_t right, stride;
  float weight_x, weight_y;

  __device__ Lerped(const Bcl& call, int64_t image, int y, int x)
      : Lerped(call, image, source_of(y, call.logits.height, call.target.height),
               source_of(x, call.logits.width, call.target.width)) {}
  __device__ Lerped(const Bcl& call, int64_t image, const Source& row, const Source& column)
      : stride(call.logits.channel_stride), weight_x(column.weight), weight_y(row.weight) {
    const View& logits = call.logits;
    top = static_cast<const float*>(logits.data) + offset_of(logits, image, 0, row.low, column.low);
    bottom = top + (row.high - row.low) * logits.row_stride;
    right = (column.high - column.low) * logits.column_stride;
  }
  __device__ float column(int64_t at) const { return fmaf(weight_y, bottom[at] - top[at], top[at]); }
  __device__ float left(int64_t c) const { return column(c * stride); }
  __device__ float to_right(int64_t c) const { return column(c * stride + right) - left(c); }
  __device__ float operator()(int64_t c) const { return fmaf(weight_x, to_right(c), left(c)); }
  template <int K>
  __device__ void read(int first, int classes, float* z) const {
#pragma unroll 4
    for (int i = 0; i < K; ++i) z[i] = first + i < classes ? (*this)(first + i) : -kInfinity;
  }
};

// What the passes have in common: each visits all pixels and finds their softmax itself, unless it says otherwise.
struct Pass {
  static constexpr bool kSelectedAlone = false, kMapped = false, kFlips = true;
  const Bcl& call;
  const Scratch& scratch;

  __device__ Pass(const Bcl& call, const Scratch& scratch) : call(call), scratch(scratch) {}
  __device__ bool has_work(const Place&, int) const { return true; }
  template <int K>
  __device__ Normalizer normalize(float (&z)[K], int64_t, int) const {
    return exponentiate(z);
  }
  __device__ void end_pixel(int64_t, int, uint16_t) const {}
  __device__ void end_row() const {}
};

// A pass scores the pixels, and adds up the gradient of their cross-entropy.
struct ScorePass : Pass {
  static constexpr bool kFlips = false;
  const float of_ce, of_boundary = 0;
  float ces = 0;
  unsigned flags = 0;
  double* const row_ces;  // A cell may have thousands of columns: a float adds up those of one row alone.

  __device__ ScorePass(const Bcl& call, const Scratch& scratch)
      : Pass(call, scratch), of_ce(call.options.ce_weight != 0 ? 1.0f : 0.0f), row_ces(own_sum()) {
    *row_ces = 0;
  }
  __device__ static double* own_sum() {
    __shared__ double sums[kWarps * 32];
    return sums + threadIdx.x;
  }
  __device__ uint16_t* scores(int64_t row) const { return scratch.score + row * scratch.score_pitch; }

  __device__ bool selected(const Place&, int, int) const { return false; }
  __device__ Labels labels(const Place&, int, int x, int64_t row) const { return Narrow::unpacked(scores(row)[x]); }
  __device__ bool evaluates(bool) const { return true; }
  __device__ uint16_t add(const CrossEntropies& ce, float weight) {
    const float s = ce.sum(call.options.score);
    ces += times_weight(weight, ce.own), flags |= isnan(s) ? kNan : 0;
    return on_grid_of(s);
  }
  __device__ void end_pixel(int64_t row, int x, uint16_t score) const {
    if (selects(call)) scores(row)[x] = score;
  }
  __device__ void end_row() {
    *row_ces += ces;
    ces = 0;
  }
  __device__ void finish() const { write_scored(*row_ces, flags, scratch.scored + block_number()); }
};

// What the passes over selected pixels share: they add up boundary terms.
struct BoundaryPass : Pass {
  float of_boundary = 0, sum = 0;

  __device__ BoundaryPass(const Bcl& call, const Scratch& scratch) : Pass(call, scratch) {
    if (selects(call)) of_boundary = scratch.factors->divisors.boundary_factor;
  }
  __device__ bool selected(const Place& place, int y, int x) const {
    return is_selected(call, scratch, place.image, y, x);
  }
  __device__ uint16_t add(const CrossEntropies& ce, float weight) {
    sum += times_weight(weight, ce.sum(call.options.terms));
    return 0;
  }
  __device__ void finish() const {
    if (selects(call) && blockIdx.z == 0) write_sum(sum, scratch.boundary + block_number());
  }
};

// A pass over the selected pixels alone: their boundary term, and its gradient.
struct SelectedPass : BoundaryPass {
  static constexpr bool kSelectedAlone = true;
  const float of_ce = 0;

  using BoundaryPass::BoundaryPass;
  __device__ bool has_work(const Place& place, int y) const {
    bool any = false;
    for (int x = place.begin_x; x < place.end_x; ++x) any |= selected(place, y, x);
    return __any_sync(kFullWarp, any);
  }
  __device__ Labels labels(const Place& place, int y, int x, int64_t) const {
    return Target{call, place.image}.of_term(y, x);
  }
  __device__ bool evaluates(bool selected) const { return selected; }
};

// A pass for a group of the classes, with max z and log-sum-exp from maps: both gradients, and with the first group the
// boundary terms.
struct MappedPass : BoundaryPass {
  static constexpr bool kMapped = true;
  const float of_ce;

  __device__ MappedPass(const Bcl& call, const Scratch& scratch)
      : BoundaryPass(call, scratch), of_ce(call.options.ce_weight != 0 ? 1.0f : 0.0f) {}
  __device__ Labels labels(const Place&, int, int x, int64_t row) const {
    return Wide::unpacked(scratch.labels[row * scratch.score_pitch + x]);
  }
  template <int K>
  __device__ Normalizer normalize(float (&z)[K], int64_t row, int x) const {
    const int64_t at = row * call.target.width + x;
    const float shift = kLog2E * scratch.best[at], log_sum = kLog2E * scratch.lse[at];
    const float scale = exp2_of(-log_sum);
#pragma unroll
    for (int i = 0; i < K; ++i) z[i] = exp2_of(exponent(z[i], shift));
    return {shift, scale, log_sum};
  }
  __device__ bool evaluates(bool selected) const { return selected && blockIdx.z == 0; }
};

template <typename Visit, int K, bool kGradient>
__global__ void __launch_bounds__(kWarps * 32, kGradient && K <= 19 ? 3 : 2) cells_kernel(
    const Bcl call, const Scratch scratch) {
  BCM_DYNAMIC_SHARED(float, shared);
  __shared__ float weights_y[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_class = static_cast<int>(blockIdx.z) * K;
  const int classes = min(K, static_cast<int>(call.logits.channels) - first_class);
  CellRows<K> rows(shared, classes);
  const Place place(call);
  // lerp_weight, one column after the other: `ahead` of the lane's source column, in steps.
  const float per_step = 1 / static_cast<float>(2 * call.target.width);
  const int in_step = place.has_right ? static_cast<int>(2 * call.logits.width) : 0;
  const int64_t first_ahead =
      (2 * place.begin_x + 1) * call.logits.width - call.target.width - 2 * call.target.width * place.cell;
  const int begin_ahead = place.has_right ? static_cast<int>(first_ahead) : 0;
  Visit pass(call, scratch);
  bool wrote = !Visit::kSelectedAlone;
  if (kGradient) rows.clear_block();

  for (int first_row = place.begin; first_row < place.end; first_row += kWarps) {
    const int y = first_row + warp;
    const bool works = y < place.end && pass.has_work(place, y);
    wrote |= works;
    if (kGradient && y < place.end) rows.clear_row(lane);
    if (works) {
      const float weight_y = lerp_weight(y, place.row, call.logits.height, call.target.height);
      const Source source_row{place.row, place.row + place.has_below, weight_y};
      if (lane == 0) weights_y[warp] = place.has_below ? weight_y : 0.0f;
      const int64_t cell = place.inside ? place.cell : 0;
      const Source at_cell{cell, cell + (place.inside && place.has_right), 0.0f};
      rows.interpolate(Lerped(call, place.image, source_row, at_cell), first_class, lane);
      float left[K], step[K], sum[K] = {}, right[K] = {};
#pragma unroll
      for (int i = 0; i < K; ++i) {
        left[i] = i < classes ? rows.left[i * kCells + lane] : -kInfinity;
        step[i] = i < classes ? rows.step[i * kCells + lane] : 0.0f;
      }
      const int64_t pixel_row = place.image * call.target.height + y;
      int ahead = begin_ahead;
      for (int x = place.begin_x; x < place.end_x; ++x, ahead += in_step) {
        const bool selected = pass.selected(place, y, x);
        if (Visit::kSelectedAlone && !selected) continue;
        const float weight_x = ahead > 0 ? static_cast<float>(ahead) * per_step : 0.0f;
        const Labels labels = pass.labels(place, y, x, pixel_row);
        uint16_t score = 0;
        if (labels.own >= 0) {
          float z[K];
#pragma unroll
          for (int i = 0; i < K; ++i) z[i] = fmaf(weight_x, step[i], left[i]);
          const Normalizer softmax = pass.normalize(z, pixel_row, x);
          if (pass.evaluates(selected)) {
            const auto logit = [&](int label) {
              const int held = label * kCells + lane;
              if (!Visit::kMapped) return fmaf(weight_x, rows.step[held], rows.left[held]);
              // The label may be of another group of classes, which this block does not hold.
              const Source column{place.cell, place.cell + place.has_right, weight_x};
              return Lerped(call, place.image, source_row, column)(label);
            };
            const CrossEntropies ce(labels, [&](int label) {
              return cross_entropy(call, softmax.log_sum, exponent(logit(label), softmax.shift));
            });
            score = pass.add(ce, class_weight_of(call, labels.own));
          }
          const Amounts<float> amounts = amounts_of(call, labels, selected, pass.of_ce, pass.of_boundary);
          if (kGradient && amounts.total != 0) {
            const float each = amounts.total * softmax.scale, each_right = each * weight_x;
#pragma unroll
            for (int i = 0; i < K; ++i) sum[i] = fmaf(each, z[i], sum[i]), right[i] = fmaf(each_right, z[i], right[i]);
            const auto take = [&](int label, float amount) {
              const int i = label - first_class;
              if (amount != 0 && i >= 0 && i < classes) rows.take(i, lane, weight_x, amount);
            };
            take(labels.own, amounts.own);
            if (Visit::kFlips) take(labels.rows, amounts.rows), take(labels.columns, amounts.columns);
          }
        }
        pass.end_pixel(pixel_row, x, score);
      }
      pass.end_row();
#pragma unroll
      for (int i = 0; kGradient && i < K; ++i) {
        if (i >= classes) continue;
        rows.sum[i * kCells + lane] += sum[i], rows.right[i * kCells + lane] += right[i];
      }
    } else if (lane == 0) {
      weights_y[warp] = 0;
    }
    if (kGradient) {
      __syncthreads();
      rows.fold(weights_y, min(kWarps, place.end - first_row));
      __syncthreads();
    }
  }
  pass.finish();
  if (!kGradient) return;
  const bool adds = Visit::kSelectedAlone && call.options.ce_weight != 0;
  if (!__syncthreads_or(wrote) && adds) return;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  const int64_t at = (block * call.logits.channels + first_class) * kNodes;
  for (int i = threadIdx.x; i < classes * kNodes; i += blockDim.x) {
    scratch.upper[at + i] = (adds ? scratch.upper[at + i] : 0.0f) + rows.upper[i];
    scratch.lower[at + i] = (adds ? scratch.lower[at + i] : 0.0f) + rows.lower[i];
  }
}

// The gradient of a source pixel: of the cells below and above it, and of the block of cells to its left. Of one class
// it is 0, unless that is a binary one.
template <bool kBinary>
__global__ void __launch_bounds__(kThreads) gather_kernel(
    const Bcl call, const Scratch scratch, float* gradient, const int64_t segments) {
  const int64_t unit = blockIdx.x, image = unit / call.logits.height, row = unit % call.logits.height;
  const float scale = scratch.factors->divisors.scale;
  for (int64_t i = threadIdx.x; i < call.logits.channels * call.logits.width; i += kThreads) {
    const int64_t c = i / call.logits.width, x = i % call.logits.width, segment = x / kCells;
    const auto parts = [&](int64_t part, int64_t node) {
      const int64_t below = ((unit * segments + part) * call.logits.channels + c) * kNodes + node;
      const float lower = row > 0 ? scratch.lower[below - segments * call.logits.channels * kNodes] : 0.0f;
      return scratch.upper[below] + lower;
    };
    float sum = parts(segment, x % kCells);
    if (x % kCells == 0 && segment > 0) sum += parts(segment - 1, kCells);
    const float value = !kBinary && call.logits.channels == 1 ? 0.0f : scale * sum;
    gradient[((image * call.logits.channels + c) * call.logits.height + row) * call.logits.width + x] = value;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) widen_kernel(const Bcl call, float* to) {
  const int64_t unit = blockIdx.x, image = unit / call.logits.height, row = unit % call.logits.height;
  const View& logits = call.logits;
  const T* from = static_cast<const T*>(logits.data) + offset_of(logits, image, 0, row);
  for (int64_t i = threadIdx.x; i < call.logits.channels * call.logits.width; i += kThreads) {
    const int64_t c = i / call.logits.width, x = i % call.logits.width;
    to[((image * call.logits.channels + c) * call.logits.height + row) * call.logits.width + x] =
        as_float(from[c * logits.channel_stride + x * logits.column_stride]);
  }
}

template <typename Visit, int K, bool kGradient>
int launch_cells(const Bcl& call, const Scratch& scratch, void* stream) {
  const int classes = static_cast<int>(call.logits.channels < K ? call.logits.channels : K);
  const int bytes = 4 * classes * (4 * kWarps * kCells + 2 * kNodes);
  return launch_with_shared(
      cells_kernel<Visit, K, kGradient>, cell_grid(call), kWarps * 32, bytes, stream, call, scratch);
}

template <typename Visit>
int launch_cells(const Bcl& call, const Scratch& scratch, bool gradient, void* stream) {
  return by_classes(call.logits.channels, [&](auto k) {
    constexpr int K = decltype(k)::value;
    return gradient ? launch_cells<Visit, K, true>(call, scratch, stream)
                    : launch_cells<Visit, K, false>(call, scratch, stream);
  });
}

}  // namespace

int widen(const Bcl& call, const Scratch& scratch, void* stream) {
  return dispatch_float(call.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    BCM_LAUNCH(widen_kernel<T>, static_cast<unsigned>(units_of(call)), kThreads, 0, stream, call, scratch.logits);
    return static_cast<int>(cudaGetLastError());
  });
}

int launch_upsampled_scores(const Bcl& call, const Scratch& scratch, bool gradient, void* stream) {
  if (!is_wide(call)) return launch_cells<ScorePass>(call, scratch, gradient && call.options.ce_weight != 0, stream);
  BCM_LAUNCH(
      (score_pixels_kernel<Lerped, kMostClasses>), pixel_grid(call), kThreads, 0, stream, call, scratch);
  return cudaGetLastError();
}

int launch_selected(const Bcl& call, const Scratch& scratch, bool gradient, void* stream) {
  if (is_wide(call) && gradient) return launch_cells<MappedPass, kMostClasses, true>(call, scratch, stream);
  if (is_wide(call)) return selects(call) ? launch_cells<MappedPass, kMostClasses, false>(call, scratch, stream) : 0;
  const bool first = gradient && call.options.ce_weight == 0;  // nothing has been written yet
  return selects(call) || first ? launch_cells<SelectedPass>(call, scratch, gradient, stream) : 0;
}

int gather_gradient(const Bcl& call, const Scratch& scratch, float* gradient, void* stream) {
  BCM_LAUNCH(
      (call.options.binary ? gather_kernel<true> : gather_kernel<false>), static_cast<unsigned>(units_of(call)),
      kThreads, 0, stream, call, scratch, gradient, segments_of(call));
  return cudaGetLastError();
}

}  // namespace bcmfnet
