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

// A block of cells by output columns: a lane has a column over all rows of the block, so that its logits change along a
// straight line, and neither the weights nor the corners do.
constexpr float kLeastTotal = 0x1p-100f;  // A sum that may have lost exponentials to underflow is taken again.
// float2 of a column lie next to each other, with a gap after 16, so that cells of 8 columns meet different banks.
__device__ inline int slot_of(int column) { return column + column / 16; }

// What the columns of a block share.
template <int K, bool kExact>
struct Columns {
  static constexpr int kHeld = K <= 19 ? 256 : 128;  // whose gradient a block has before it adds them to the nodes
  static constexpr int kSlots = kHeld + kHeld / 16;
  float2* nodes;     // [classes, kNodes]: exponents to base 2 at the upper source row, and on to the lower one
  float2* lines;     // [classes, threads]: the same at a thread's column
  float2* gradient;  // [classes, kSlots]: the sum over the rows, and the part of the lower source row
  const int given;

  __device__ Columns(float2* shared, int classes)
      : nodes(shared), lines(nodes + classes * kNodes), gradient(lines + classes * kWarps * 32), given(classes) {}
  __device__ int classes() const { return kExact ? K : given; }
  static int bytes(int classes, bool gradient) {
    return 8 * classes * (kNodes + kWarps * 32 + (gradient ? kSlots : 0));
  }

  // A softmax does not change where all logits of a node lose the same: their largest, so that exponents are at most 0.
  __device__ void read(const Bcl& call, int64_t image, int64_t row, int64_t lower_row, int64_t first_cell) const {
    const int node = threadIdx.x;
    if (node >= kNodes) return;
    const int64_t column = first_cell + node < call.logits.width ? first_cell + node : call.logits.width - 1;
    const View& logits = call.logits;
    const float* from = static_cast<const float*>(logits.data) + offset_of(logits, image, 0, row, column);
    const int64_t down = (lower_row - row) * logits.row_stride;
    float upper[K], lower[K], most_upper = -kInfinity, most_lower = -kInfinity;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if (i >= classes()) continue;
      upper[i] = from[i * logits.channel_stride], lower[i] = from[i * logits.channel_stride + down];
      most_upper = fmaxf(most_upper, upper[i]), most_lower = fmaxf(most_lower, lower[i]);
    }
    const float shift_upper = kLog2E * most_upper, shift_lower = kLog2E * most_lower;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if (i >= classes()) continue;
      const float at = exponent(upper[i], shift_upper);
      nodes[i * kNodes + node] = make_float2(at, exponent(lower[i], shift_lower) - at);
    }
  }

  // Add the columns from `first_x` on to the source rows above and below: of a class always the same warp does, of a
  // cell the same lane.
  __device__ void fold(
      const Scratch& scratch, const int* edges, const float* weights_x, int first_x, bool first,
      int64_t channels) const {
    constexpr int kOfWarp = (K + kWarps - 1) / kWarps;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int begin = max(edges[lane] - first_x, 0), end = min(edges[lane + 1] - first_x, kHeld);
    float sum[kOfWarp] = {}, below[kOfWarp] = {}, right[kOfWarp] = {}, below_right[kOfWarp] = {};
    for (int column = begin; column < end; ++column) {
      const float weight = weights_x[slot_of(column)];
      const float2* const from = gradient + warp * kSlots + slot_of(column);
#pragma unroll
      for (int i = 0; i < kOfWarp; ++i) {
        if (warp + i * kWarps >= classes()) continue;
        const float2 value = from[i * kWarps * kSlots];
        sum[i] += value.x, right[i] = fmaf(weight, value.x, right[i]);
        below[i] += value.y, below_right[i] = fmaf(weight, value.y, below_right[i]);
      }
    }
    const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
    const int64_t at = (block * channels + warp) * kNodes + lane;
    float *const upper = scratch.upper + at, *const lower = scratch.lower + at;
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      if (warp + i * kWarps >= classes()) continue;
      const float right_upper = right[i] - below_right[i], right_lower = below_right[i];
      const float left_upper = (sum[i] - below[i]) - right_upper, left_lower = below[i] - right_lower;
      const float from_left_upper = __shfl_up_sync(kFullWarp, right_upper, 1);
      const float from_left_lower = __shfl_up_sync(kFullWarp, right_lower, 1);
      const auto add = [&](int64_t node, float above, float under) {
        upper[node] = (first ? 0.0f : upper[node]) + above, lower[node] = (first ? 0.0f : lower[node]) + under;
      };
      const int64_t held = static_cast<int64_t>(i) * kWarps * kNodes;
      add(held, left_upper + (lane > 0 ? from_left_upper : 0.0f), left_lower + (lane > 0 ? from_left_lower : 0.0f));
      if (lane == 31) add(held + 1, right_upper, right_lower);
    }
  }
};

// A pass scores the pixels, and adds up the gradient of their cross-entropy.
struct ScorePass {
  static constexpr bool kSelectedAlone = false;
  const Bcl& call;
  const Scratch& scratch;
  uint16_t* at = nullptr;  // the labels of a pixel, then its score
  float ces = 0;           // of some rows: a cell may have thousands
  double sum = 0;
  unsigned flags = 0;

  __device__ ScorePass(const Bcl& call, const Scratch& scratch) : call(call), scratch(scratch) {}
  __device__ void begin_column(int y, int x, int64_t image) {
    at = scratch.score + (image * call.target.height + y) * scratch.score_pitch + x;
  }
  __device__ Labels labels(int, int, int64_t) const { return Narrow::unpacked(*at); }
  __device__ uint16_t add(const CrossEntropies& ce, float weight) {
    const float s = ce.sum(call.options.score);
    ces += times_weight(weight, ce.own), flags |= isnan(s) ? kNan : 0;
    return on_grid_of(s);
  }
  __device__ Amounts<float> amounts(const Labels&, float weight) const { return {weight, 0, 0, weight}; }
  __device__ void end_pixel(uint16_t score) {
    if (selects(call)) *at = score;
    at += scratch.score_pitch;
  }
  __device__ void end_rows() { sum += ces, ces = 0; }
  __device__ void finish() const {
    write_scored(sum, flags, scratch.scored + block_number());
  }
};

// A pass over the selected pixels alone: their boundary term, and its gradient.
struct SelectedPass {
  static constexpr bool kSelectedAlone = true;
  const Bcl& call;
  const Scratch& scratch;
  float of_boundary = 0, sum = 0;

  __device__ SelectedPass(const Bcl& call, const Scratch& scratch) : call(call), scratch(scratch) {
    if (selects(call)) of_boundary = scratch.factors->divisors.boundary_factor;
  }
  __device__ Labels labels(int y, int x, int64_t image) const {
    return Target{call, static_cast<int>(image)}.of_term(y, x);
  }
  __device__ uint16_t add(const CrossEntropies& ce, float weight) {
    sum += times_weight(weight, ce.sum(call.options.terms));
    return 0;
  }
  __device__ Amounts<float> amounts(const Labels& labels, float weight) const {
    const float boundary = weight * of_boundary;
    return bcmfnet::amounts_of(call.options.terms, 0.0f, boundary, labels.rows >= 0, labels.columns >= 0);
  }
  __device__ void end_pixel(uint16_t) const {}
  __device__ void finish() const {
    if (selects(call)) write_sum(sum, scratch.boundary + block_number());
  }
};

// Of K classes exactly, or of at most so many.
template <typename Visit, int K, bool kExact, bool kGradient>
__global__ void __launch_bounds__(kWarps * 32, kGradient && K <= 19 ? 3 : 2) columns_kernel(
    const Bcl call, const Scratch scratch) {
  constexpr int kHeld = Columns<K, kExact>::kHeld, kSlots = Columns<K, kExact>::kSlots;
  BCM_DYNAMIC_SHARED(float2, shared);
  // The first column of each cell; the first row, and that of the row of cells below. All of it is written, since the
  // compiler reads 16 bytes at once.
  constexpr int kEdges = kNodes + 3;
  __shared__ __align__(16) int edges[kEdges];
  __shared__ float weights_x[kSlots], class_weights[K];
  const int classes = kExact ? K : min(K, static_cast<int>(call.logits.channels));
  const Columns<K, kExact> columns(shared, classes);
  const int lane = threadIdx.x % 32;
  const unsigned source_height = static_cast<unsigned>(call.logits.height);
  const int64_t image = blockIdx.x / source_height, source_row = blockIdx.x % source_height;
  const int64_t first_cell = static_cast<int64_t>(blockIdx.y) * kCells;
  if (threadIdx.x < kEdges) {
    const int row = static_cast<int>(threadIdx.x) - kNodes;
    const View &logits = call.logits, &target = call.target;
    edges[threadIdx.x] = static_cast<int>(
        row >= 0 ? first_output(source_row + row, logits.height, target.height)
                 : first_output(first_cell + threadIdx.x, logits.width, target.width));
  }
  if (threadIdx.x < classes) class_weights[threadIdx.x] = class_weight_of(call, threadIdx.x);
  const int64_t lower_row = high_of(source_row, call.logits.height, call.target.height);
  columns.read(call, image, source_row, lower_row, first_cell);
  __syncthreads();

  const int begin_y = edges[kNodes], end_y = edges[kNodes + 1], end_x = edges[kCells];
  // lerp_weight: how far a row or a column is ahead of its source, in steps.
  const float per_step_y = 1 / static_cast<float>(2 * call.target.height);
  const float per_step_x = 1 / static_cast<float>(2 * call.target.width);
  const bool has_below = lower_row != source_row;
  const int step_y = has_below ? static_cast<int>(2 * call.logits.height) : 0;
  const int first_ahead_y = has_below ? static_cast<int>(
      (2 * begin_y + 1) * call.logits.height - call.target.height - 2 * call.target.height * source_row) : 0;
  const int64_t ahead_of_edge =
      (2 * static_cast<int64_t>(edges[0]) + 1) * call.logits.width - call.target.width -
      2 * call.target.width * first_cell;
  const unsigned cell_width = static_cast<unsigned>(2 * call.target.width);
  const int threshold = Visit::kSelectedAlone && selects(call)
      ? scratch.factors->threshold[call.options.per_image ? image : 0] : 0;
  const bool adds = Visit::kSelectedAlone && call.options.ce_weight != 0;
  Visit pass(call, scratch);

  for (int first_x = edges[0]; first_x < end_x; first_x += kHeld) {
    bool wrote = !Visit::kSelectedAlone;
    for (int held = threadIdx.x; held < kHeld; held += kWarps * 32) {
      const int x = first_x + held, slot = slot_of(held);
      if (first_x + held - lane >= end_x) break;
      const bool inside = x < end_x;
      const int64_t reaches = ahead_of_edge + 2 * call.logits.width * (x - edges[0]);
      const unsigned ahead = reaches > 0 && inside ? static_cast<unsigned>(reaches) : 0;
      const int node = static_cast<int>(ahead / cell_width);
      const bool has_right = high_of(first_cell + node, call.logits.width, call.target.width) != first_cell + node;
      const float weight_x = has_right ? static_cast<float>(ahead - node * cell_width) * per_step_x : 0.0f;
      weights_x[slot] = weight_x;
      float from[K], slope[K], sum[K], below[K];
      float2* const gradient = columns.gradient + slot;
      float2* const lines = columns.lines + threadIdx.x;
      bool ready = false;
      const auto prepare = [&] {
        ready = wrote = true;
#pragma unroll
        for (int i = 0; i < K; ++i) {
          sum[i] = below[i] = 0;
          from[i] = -kInfinity, slope[i] = 0;
          if (i >= classes) continue;
          const float2* const at = columns.nodes + i * kNodes + node;
          const float2 left = at[0], right = at[has_right];
          from[i] = fmaf(weight_x, right.x - left.x, left.x), slope[i] = fmaf(weight_x, right.y - left.y, left.y);
          lines[i * kWarps * 32] = make_float2(from[i], slope[i]);
        }
      };
      if (kGradient)
        for (int i = 0; i < classes; ++i) gradient[i * kSlots] = make_float2(0.0f, 0.0f);
      const auto visit = [&](int y) {
        const int ahead_y = first_ahead_y + step_y * (y - begin_y);
        const float weight_y = ahead_y > 0 ? static_cast<float>(ahead_y) * per_step_y : 0.0f;
        const Labels labels = pass.labels(y, x, image);
        uint16_t score = 0;
        if (labels.own >= 0) {
          float z[K], total = 0, shift = 0;
#pragma unroll
          for (int i = 0; i < K; ++i) z[i] = exp2_of(fmaf(weight_y, slope[i], from[i])), total += z[i];
          if (!(total > kLeastTotal)) {
            shift = -kInfinity, total = 0;
#pragma unroll
            for (int i = 0; i < K; ++i) shift = fmaxf(shift, fmaf(weight_y, slope[i], from[i]));
#pragma unroll
            for (int i = 0; i < K; ++i) z[i] = exp2_of(fmaf(weight_y, slope[i], from[i]) - shift), total += z[i];
          }
          const float log_sum = log2_of(total);
          const CrossEntropies ce(labels, [&](int label) {
            const float2 line = lines[label * kWarps * 32];
            return cross_entropy(call, log_sum, fmaf(weight_y, line.y, line.x) - shift);
          });
          const float weight = class_weights[labels.own];
          score = pass.add(ce, weight);
          if (kGradient) {
            const Amounts<float> amounts = pass.amounts(labels, weight);
            const float each = amounts.total * reciprocal_of(total), each_below = each * weight_y;
#pragma unroll
            for (int i = 0; i < K; ++i) {
              sum[i] = fmaf(each, z[i], sum[i]), below[i] = fmaf(each_below, z[i], below[i]);
            }
            const auto take = [&](int label, float amount) {
              if (amount == 0) return;
              float2& at = gradient[label * kSlots];
              at = make_float2(at.x - amount, fmaf(-weight_y, amount, at.y));
            };
            take(labels.own, amounts.own);
            if (Visit::kSelectedAlone) take(labels.rows, amounts.rows), take(labels.columns, amounts.columns);
          }
        }
        pass.end_pixel(score);
      };
      if constexpr (!Visit::kSelectedAlone) {
        prepare();
        pass.begin_column(begin_y, x, image);
      }
      for (int first_y = begin_y; first_y < end_y; first_y += 32) {
        const int last_y = min(end_y, first_y + 32);
        if constexpr (Visit::kSelectedAlone) {
          unsigned rows = 0;
          for (int y = first_y; inside && selects(call) && y < last_y; ++y) {
            const int score = score_of_candidate(scratch, image * call.target.height + y, x);
            rows |= static_cast<unsigned>(score >= 0 && score >= threshold) << (y - first_y);
          }
          if (!__any_sync(kFullWarp, rows != 0)) continue;
          if (!ready) prepare();
          for (; rows != 0; rows &= rows - 1) visit(first_y + __ffs(rows) - 1);
        } else {
          for (int y = first_y; inside && y < last_y; ++y) visit(y);
          pass.end_rows();
        }
      }
      if (kGradient && ready) {
#pragma unroll
        for (int i = 0; i < K; ++i) {
          if (i >= classes) continue;
          float2& at = gradient[i * kSlots];
          at = make_float2(at.x + sum[i], at.y + below[i]);
        }
      }
    }
    if (!kGradient) continue;
    const bool first = first_x == edges[0] && !adds;
    if (!__syncthreads_or(wrote) && !first) continue;
    columns.fold(scratch, edges, weights_x, first_x, first, call.logits.channels);
    __syncthreads();
  }
  pass.finish();
}

// A pass for a group of the classes, with max z and log-sum-exp from maps: both gradients, and with the first group the
// boundary terms.
struct MappedPass {
  const Bcl& call;
  const Scratch& scratch;
  const float of_ce;
  float of_boundary = 0, sum = 0;

  __device__ MappedPass(const Bcl& call, const Scratch& scratch)
      : call(call), scratch(scratch), of_ce(call.options.ce_weight != 0 ? 1.0f : 0.0f) {
    if (selects(call)) of_boundary = scratch.factors->divisors.boundary_factor;
  }
  __device__ Labels labels(int64_t row, int x) const {
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
  __device__ void add(const CrossEntropies& ce, float weight) {
    sum += times_weight(weight, ce.sum(call.options.terms));
  }
  __device__ void finish() const {
    if (selects(call) && blockIdx.z == 0) write_sum(sum, scratch.boundary + block_number());
  }
};

template <int K, bool kGradient>
__global__ void __launch_bounds__(kWarps * 32, 2) cells_kernel(
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
  MappedPass pass(call, scratch);
  if (kGradient) rows.clear_block();

  for (int first_row = place.begin; first_row < place.end; first_row += kWarps) {
    const int y = first_row + warp;
    if (kGradient && y < place.end) rows.clear_row(lane);
    if (y < place.end) {
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
        const bool selected = is_selected(call, scratch, place.image, y, x);
        const float weight_x = ahead > 0 ? static_cast<float>(ahead) * per_step : 0.0f;
        const Labels labels = pass.labels(pixel_row, x);
        if (labels.own >= 0) {
          float z[K];
#pragma unroll
          for (int i = 0; i < K; ++i) z[i] = fmaf(weight_x, step[i], left[i]);
          const Normalizer softmax = pass.normalize(z, pixel_row, x);
          if (pass.evaluates(selected)) {
            const auto logit = [&](int label) {
              // The label may be of another group of classes, which this block does not hold.
              const Source column{place.cell, place.cell + place.has_right, weight_x};
              return Lerped(call, place.image, source_row, column)(label);
            };
            const CrossEntropies ce(labels, [&](int label) {
              return cross_entropy(call, softmax.log_sum, exponent(logit(label), softmax.shift));
            });
            pass.add(ce, class_weight_of(call, labels.own));
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
            take(labels.own, amounts.own), take(labels.rows, amounts.rows), take(labels.columns, amounts.columns);
          }
        }
      }
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
  __syncthreads();
  const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  const int64_t at = (block * call.logits.channels + first_class) * kNodes;
  for (int i = threadIdx.x; i < classes * kNodes; i += blockDim.x) {
    scratch.upper[at + i] = rows.upper[i], scratch.lower[at + i] = rows.lower[i];
  }
}

// The gradient of a source pixel: of the cells below and above it, and of the block of cells to its left. Of one class
// it is 0, unless that is a binary one.
constexpr int kGathered = 128;  // columns of a block, whose threads go over the classes

template <bool kBinary>
__global__ void __launch_bounds__(kGathered) gather_kernel(
    const Bcl call, const Scratch scratch, float* gradient, const int64_t segments) {
  const unsigned unit = blockIdx.x, height = static_cast<unsigned>(call.logits.height);
  const unsigned image = unit / height, row = unit % height, x = blockIdx.y * kGathered + threadIdx.x;
  const int64_t classes = call.logits.channels, block = classes * kNodes, above = segments * block;
  if (x >= call.logits.width) return;
  const unsigned segment = x / kCells, node = x % kCells;
  const int64_t at = (unit * segments + segment) * block + node;
  const float *upper = scratch.upper + at, *lower = scratch.lower + at - above;
  const float scale = scratch.factors->divisors.scale;
  const bool is_shared = node == 0 && segment > 0;
  const int64_t before = kCells - block;  // the last node of the block to the left
  const int64_t plane = call.logits.height * call.logits.width;
  float* to = gradient + (image * classes * height + row) * call.logits.width + x;
#pragma unroll 4
  for (int64_t c = 0; c < classes; ++c, upper += kNodes, lower += kNodes, to += plane) {
    float sum = upper[0] + (row > 0 ? lower[0] : 0.0f);
    if (is_shared) sum += upper[before] + (row > 0 ? lower[before] : 0.0f);
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
  return by_classes(call.logits.channels, [&](auto k) {
    constexpr int K = decltype(k)::value;
    const auto launch = [&](auto exact) {
      constexpr bool kExact = decltype(exact)::value;
      const auto kernel = gradient ? columns_kernel<Visit, K, kExact, true> : columns_kernel<Visit, K, kExact, false>;
      const int bytes = Columns<K, kExact>::bytes(static_cast<int>(call.logits.channels), gradient);
      return launch_with_shared(kernel, cell_grid(call), kWarps * 32, bytes, stream, call, scratch);
    };
    return call.logits.channels == K ? launch(std::true_type()) : launch(std::false_type());
  });
}

template <bool kGradient>
int launch_groups(const Bcl& call, const Scratch& scratch, void* stream) {
  constexpr int kBytes = 4 * kMostClasses * (4 * kWarps * kCells + 2 * kNodes);
  return launch_with_shared(
      cells_kernel<kMostClasses, kGradient>, cell_grid(call), kWarps * 32, kBytes, stream, call, scratch);
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
  if (!is_wide(call)) return launch_columns<ScorePass>(call, scratch, gradient && call.options.ce_weight != 0, stream);
  BCM_LAUNCH(
      (score_pixels_kernel<Lerped, kMostClasses>), pixel_grid(call), kThreads, 0, stream, call, scratch);
  return cudaGetLastError();
}

int launch_selected(const Bcl& call, const Scratch& scratch, bool gradient, void* stream) {
  if (is_wide(call) && gradient) return launch_groups<true>(call, scratch, stream);
  if (is_wide(call)) return selects(call) ? launch_groups<false>(call, scratch, stream) : 0;
  const bool first = gradient && call.options.ce_weight == 0;  // nothing has been written yet
  return selects(call) || first ? launch_columns<SelectedPass>(call, scratch, gradient, stream) : 0;
}

int gather_gradient(const Bcl& call, const Scratch& scratch, float* gradient, void* stream) {
  BCM_LAUNCH(
      (call.options.binary ? gather_kernel<true> : gather_kernel<false>), gather_grid(call), kGathered, 0, stream, call,
      scratch, gradient, segments_of(call));
  return cudaGetLastError();
}

}  // namespace bcmfnet
