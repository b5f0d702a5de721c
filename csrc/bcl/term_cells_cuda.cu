// The room of terms at cells of low-resolution logits: scores of up to kMostClasses, and the gradient.
#include "bcl/columns_cuda.h"
#include "bcl/terms_cuda.h"

namespace bcmfnet {
namespace {

// Exponents to base 2 at the upper left corner of a cell, and how they change on to the others.
struct alignas(16) Corners {
  float at, down, right, down_right;
};

// What a block has of its cells: [K, kNodes], with -inf of classes that there are not.
template <int K>
struct Cells {
  Corners* const corners;
  bool steep = false;  // whether an exponent is

  // Can be read afterwards, as the block's edges can. Of a whole block.
  __device__ Cells(const CellBlock& block, int classes, Corners* corners) : corners(corners) {
    float least = 0;
    const int node = threadIdx.x;
    if (node < kNodes) {
      Corners* const of = corners + node;
      least = read_node<K>(
          block, classes, 0, node, [&](int i) -> float& { return of[i * kNodes].at; },
          [&](int i) -> float& { return of[i * kNodes].down; });
    }
    steep = __syncthreads_or(Exponentials<K>::is_steep(least)) != 0;
    const int64_t width = block.call.logits.width, left = block.first_cell + threadIdx.x % kCells;
    const bool has_right = high_of(left, width, block.call.target.width) != left;
    for (int i = static_cast<int>(threadIdx.x) / kCells; i < K; i += kWarps) {
      Corners* const of = corners + i * kNodes + threadIdx.x % kCells;
      const bool changes = i < classes && has_right;
      if (i >= classes) of->at = -kInfinity, of->down = 0;
      of->right = changes ? of[1].at - of->at : 0.0f, of->down_right = changes ? of[1].down - of->down : 0.0f;
    }
    __syncthreads();
  }
  // Of a class along a column: at the upper source row, and on to the lower one.
  __device__ float2 line(int label, const Across::Column& column) const {
    const Corners of = corners[label * kNodes + column.node];
    return make_float2(fmaf(column.weight, of.right, of.at), fmaf(column.weight, of.down_right, of.down));
  }
  __device__ float exponent(int label, const Across::Column& column, float weight_y) const {
    const float2 of = line(label, column);
    return fmaf(weight_y, of.y, of.x);
  }
};

// The exponentials of a column's classes, row after row; with kFollows each from the one before it, where they may.
template <int K, bool kFollows>
struct Progression {
  const Cells<K>& cells;
  const Across::Column& column;
  float z[K], ratio[K], shift = 0;

  // Of a row, and with kAdvances by what they are multiplied for the next one. All exponents of a pixel lose the
  // largest where exponentials might be lost.
  template <bool kAdvances>
  __device__ void start(float weight_y, float step) {
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const float2 line = cells.line(i, column);
      z[i] = fmaf(weight_y, line.y, line.x);
      if (kAdvances) ratio[i] = exp2_of(step * line.y);
    }
    if (!kAdvances && cells.steep) {
      shift = -kInfinity;
#pragma unroll
      for (int i = 0; i < K; ++i) shift = fmaxf(shift, z[i]);
#pragma unroll
      for (int i = 0; i < K; ++i) z[i] -= shift;
    }
#pragma unroll
    for (int i = 0; i < K; ++i) z[i] = exp2_of(z[i]);
  }
  __device__ float exponent_of(int label, float weight_y) const {
    return cells.exponent(label, column, weight_y) - shift;
  }
  // Up to a number that is the pixel's own.
  __device__ float logit_of(int label, float weight_y) const { return kLn2 * exponent_of(label, weight_y); }
  // Calls visit(row of the run, weight of the lower source row); with `is_exact` no exponentials follow from others.
  template <typename Visit>
  __device__ void each(const Down& runs, int y, bool is_exact, const Visit& visit) {
    const bool exact = !kFollows || is_exact;
    const int rows = runs.rows(y);
    const float first = runs(y), step = runs.step_of(y);
    if (!exact) start<true>(first, step);
    for (int row = 0; row < rows; ++row) {
      float weight_y = fmaf(static_cast<float>(row), step, first);
      if (exact) {
        weight_y = runs(y + row);
        start<false>(weight_y, step);
      } else if (row > 0) {
#pragma unroll
        for (int i = 0; i < K; ++i) z[i] *= ratio[i];
      }
      visit(row, weight_y);
    }
  }
};

// Logits of the teacher at a pixel; its cells are those of the logits where it has their size.
__device__ inline Sampled<AnyFloat, true> teacher_at(
    const Bcl& call, int64_t image, const Source& row, const Source& column, int y, int x) {
  if (call.teacher.height != call.logits.height || call.teacher.width != call.logits.width)
    return sampled<AnyFloat, true>(call, call.teacher, image, y, x);
  return {call, call.teacher, image, row, column};
}
__device__ inline Sampled<AnyFloat, true> teacher_at(
    const CellBlock& block, const Across::Column& column, float weight_y, int y, int x) {
  const int64_t cell = block.first_cell + column.node;
  return teacher_at(
      block.call, block.image, {block.row, block.lower_row(), weight_y}, {cell, cell + column.has_right, column.weight},
      y, x);
}

// Whether a call has cross-entropy and overlap alone, for which the kernels are smaller.
bool is_plain(const Bcl& call) {
  const BclOptions& options = call.options;
  return has_overlap(options) && !selects(call) && !distills(call) && options.smoothing == 0 &&
         options.focal_weight == 0 && !options.binary && call.pixel_weight.data == nullptr;
}

// The call, as the compiler shall know it.
template <bool kPlain>
__device__ Bcl as_plain(Bcl call) {
  if constexpr (kPlain) {
    BclOptions& options = call.options;
    options.boundary_weight = options.smoothing = options.focal_weight = options.distillation_weight = 0;
    options.binary = false, call.pixel_weight.data = nullptr;
  }
  return call;
}

// Cross-entropy, score, losses and sums of overlap of each pixel. A thread has a column over all rows of a block.
template <int K, bool kPlain>
__global__ void __launch_bounds__(kWarps * 32, K <= 19 && kPlain ? 3 : 2) column_scores_kernel(
    const Bcl given, const Scratch scratch) {
  constexpr int kMostHeld = 64;  // pixels that are added up as floats
  BCM_DYNAMIC_SHARED(Corners, shared);
  __shared__ __align__(16) int edges[CellBlock::kEdges];
  __shared__ float class_weights[K];
  const Bcl call = as_plain<kPlain>(given);
  const int lane = threadIdx.x % 32, classes = static_cast<int>(classes_of(call));
  if (threadIdx.x < classes) class_weights[threadIdx.x] = weight_of_class(call, static_cast<int>(threadIdx.x));
  const CellBlock block(call, scratch.tile, edges, call.options.align_corners);
  const Cells<K> cells(block, classes, shared);
  const Across across(block);
  const Down runs(block);
  const TargetOf<true> target{call, static_cast<int>(block.image)};
  const bool tallies = kPlain || has_overlap(call.options), exact = cells.steep || selects(call);
  Tally tally(reinterpret_cast<float*>(shared + K * kNodes), tallies ? classes : 0);
  const int end_x = block.end_x();
  double sums[4] = {};
  float predicted[K] = {};
  Losses losses;
  int held = 0;
  for (int x = block.begin_x() + static_cast<int>(threadIdx.x); x - lane < end_x; x += kWarps * 32) {
    const bool inside = x < end_x, last = x - lane + kWarps * 32 >= end_x;
    const Across::Column column = across(x);
    Progression<K, kPlain || K <= 19> softmax{cells, column};
    for (int first_y = runs.begin; first_y < runs.end; first_y += runs.rows(first_y)) {
      const int64_t first_row = block.image * call.target.height + first_y;
      uint16_t* label_or_score = scratch.score + first_row * scratch.score_pitch + x;
      softmax.each(runs, first_y, exact, [&](int row, float weight_y) {
        if (!inside) return;
        const int y = first_y + row;
        const Labels labels = Narrow::unpacked(*label_or_score);
        const float u = target.weight(y, x);
        Scored scored{};
        if (labels.own >= 0) {
          float total = 0;
#pragma unroll
          for (int i = 0; i < K; ++i) total += softmax.z[i];
          const auto exponent_of = [&](int label) { return softmax.exponent_of(label, weight_y); };
          const float weight = u * class_weights[labels.own];
          scored = score_of(call, labels, u, weight, log2_of(total), exponent_of, losses);
          if (tallies) {
            const float part = reciprocal_of(total), scale = u * part;
#pragma unroll
            for (int i = 0; i < K; ++i) predicted[i] = fmaf(scale, softmax.z[i], predicted[i]);
            tally.take(labels.own, u, part * exp2_of(exponent_of(labels.own)));
          }
        }
        if (is_distilled(call, labels, u)) {
          const auto logits = [&](int c) { return softmax.logit_of(c, weight_y); };
          const auto teacher = teacher_at(block, column, weight_y, y, x);
          const auto student = Tempered::of(call, logits, largest_of(call, logits));
          const auto taught = Tempered::of(call, teacher, largest_of(call, teacher));
          losses.distillation += u * divergence(call, student, logits, taught, teacher);
        }
        if (selects(call)) {
          *label_or_score = scored.score;
          scratch.term[(first_row + row) * call.target.width + x] = scored.term;
        }
        label_or_score += scratch.score_pitch;
      });
      held += runs.rows(first_y);
      const bool ends = last && first_y + runs.rows(first_y) == runs.end;
      if (held < kMostHeld && !ends) continue;
      held = 0;
      sums[0] += losses.ce, sums[1] += losses.spread, sums[2] += losses.focal, sums[3] += losses.distillation;
      losses.ce = losses.spread = losses.focal = losses.distillation = 0;
      if (tallies) tally.fold(predicted);
      if (!ends) tally.clear();
    }
  }
  const int64_t number = block_number();
  write_scored(sums[0], losses.flags, scratch.scored + number);
  if constexpr (kPlain) {
    if (threadIdx.x == 0) scratch.scored_terms[number] = TermSums{};
  } else {
    write_terms({0, 0, sums[1], sums[2], sums[3]}, scratch.scored_terms + number);
  }
  if (tallies) tally.write(scratch.overlap + 3 * number * classes, classes);
}

// Whose gradient a block has before it adds them to the nodes.
template <int K>
constexpr int kColumnsHeld = K <= 19 ? 256 : 128;

// The gradient of all terms.
template <int K, bool kPlain>
__global__ void __launch_bounds__(kWarps * 32, K <= 19 && kPlain ? kResident : 2) column_gradient_kernel(
    const Bcl given, const Scratch scratch) {
  constexpr int kHeld = kColumnsHeld<K>, kSlots = slot_of(kHeld);
  BCM_DYNAMIC_SHARED(Corners, shared);
  __shared__ __align__(16) int edges[CellBlock::kEdges];
  __shared__ float weights_x[kSlots];
  float2* const gradients = reinterpret_cast<float2*>(shared + K * kNodes);  // [K, kSlots], see fold_columns
  __shared__ float class_weights[K];
  const Bcl call = as_plain<kPlain>(given);
  const int lane = threadIdx.x % 32, classes = static_cast<int>(classes_of(call));
  if (threadIdx.x < classes) class_weights[threadIdx.x] = weight_of_class(call, static_cast<int>(threadIdx.x));
  const CellBlock block(call, scratch.tile, edges, call.options.align_corners);
  const Cells<K> cells(block, classes, shared);
  const Across across(block);
  const Down runs(block);
  const TargetOf<true> target{call, static_cast<int>(block.image)};
  const Shares shares(call, scratch.factors->scales, scratch.slopes, block.image);
  const int end_x = block.end_x();
  float slopes[K];
#pragma unroll
  for (int i = 0; i < K; ++i) slopes[i] = shares.slopes != nullptr && i < classes ? shares.slopes[i] : 0.0f;

  for (int first_x = block.begin_x(); first_x < end_x; first_x += kHeld) {
    for (int held = threadIdx.x; held < kHeld && first_x + held - lane < end_x; held += kWarps * 32) {
      const int x = first_x + held, slot = slot_of(held);
      const Across::Column column = across(x);
      float2* const gradient = gradients + slot;
      weights_x[slot] = column.weight;
#pragma unroll
      for (int i = 0; i < K; ++i) gradient[i * kSlots] = make_float2(0.0f, 0.0f);
      Progression<K, kPlain || K <= 19> softmax{cells, column};
      for (int first_y = runs.begin; x < end_x && first_y < runs.end; first_y += runs.rows(first_y)) {
        const int64_t first_row = block.image * call.target.height + first_y;
        const uint16_t* word = scratch.score + first_row * scratch.score_pitch + x;
        // Of the rows so far: sums of the gradient, and sums of these sums.
        float sum[K] = {}, sums[K] = {}, spread = 0, spread_below = 0;
        softmax.each(runs, first_y, cells.steep, [&](int row, float weight_y) {
          const int y = first_y + row;
          Labels labels = Narrow::unpacked(*word);
          word += scratch.score_pitch;
          bool selected = false;
          if (selects(call)) {
            labels = {target.known(target.read(y, x)), -1, -1};
            selected = labels.own >= 0 && is_selected(call, scratch, block.image, y, x);
            if (selected) labels = target.of_term(y, x);
          }
          const float u = target.weight(y, x);
          if (labels.own >= 0 || is_distilled(call, labels, u)) {
            float total = 0, inner = 0;
#pragma unroll
            for (int i = 0; i < K; ++i) total += softmax.z[i], inner = fmaf(slopes[i], softmax.z[i], inner);
            const float part = reciprocal_of(total), log_total = log2_of(total);
            const float weight = labels.own >= 0 ? u * class_weights[labels.own] : 0.0f;
            const PixelGradient pixel(call, shares, labels, u, weight, selected, inner * part, [&](int label) {
              return softmax.exponent_of(label, weight_y) - log_total;
            });
            const auto take = [&](int label, float amount) {
              float2& at = gradient[label * kSlots];
              at = make_float2(at.x - amount, fmaf(-weight_y, amount, at.y));
            };
            if (pixel.counts) {
              const float each = pixel.amounts.total * part, sloped = pixel.overlap * part;
#pragma unroll
              for (int i = 0; i < K; ++i) sum[i] = fmaf(softmax.z[i], fmaf(sloped, slopes[i], each), sum[i]);
              spread += pixel.spread, spread_below = fmaf(weight_y, pixel.spread, spread_below);
              take(labels.own, pixel.amounts.own);
              if (pixel.amounts.rows != 0) take(labels.rows, pixel.amounts.rows);
              if (pixel.amounts.columns != 0) take(labels.columns, pixel.amounts.columns);
            }
            if (pixel.distillation != 0) {
              const auto logits = [&](int c) { return softmax.logit_of(c, weight_y); };
              const auto teacher = teacher_at(block, column, weight_y, y, x);
              const auto student = Tempered::of(call, logits, largest_of(call, logits));
              const auto taught = Tempered::of(call, teacher, largest_of(call, teacher));
              for (int i = 0; i < classes; ++i)
                take(i, pixel.distillation * (exp2_of(taught(teacher(i))) - exp2_of(student(logits(i)))));
            }
          }
#pragma unroll
          for (int i = 0; i < K; ++i) sums[i] += sum[i];
        });
        // Row i of n is n - i times in the sums: with the weights w + i * step, those of the lower source row follow.
        const float step = runs.step_of(first_y);
        const float after = fmaf(static_cast<float>(runs.rows(first_y)), step, runs(first_y));
#pragma unroll
        for (int i = 0; i < K; ++i) {
          float2& at = gradient[i * kSlots];
          at = make_float2(at.x + sum[i], fmaf(after, sum[i], fmaf(-step, sums[i], at.y)));
        }
        for (int c = 0; spread != 0 && c < classes; ++c) {
          float2& at = gradient[c * kSlots];
          at = make_float2(fmaf(-class_weights[c], spread, at.x), fmaf(-class_weights[c], spread_below, at.y));
        }
      }
    }
    __syncthreads();
    fold_columns<K, kHeld>(
        gradients + classes_before_channels(call) * kSlots, static_cast<int>(call.logits.channels), scratch.parts.upper,
        scratch.parts.lower, edges, weights_x, first_x, first_x == block.begin_x());
    __syncthreads();
  }
}

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

// The same of a group of many classes, with what a pixel has of all from maps. A lane has a cell, row after row.
__global__ void __launch_bounds__(kWarps * 32, 2) group_gradient_kernel(const Bcl call, const Scratch scratch) {
  constexpr int K = kMostClasses;
  BCM_DYNAMIC_SHARED(float, shared);
  __shared__ float weights_y[kWarps], slopes[K];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_class = static_cast<int>(blockIdx.z) * K;
  const int classes = min(K, static_cast<int>(call.logits.channels) - first_class);
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
      const auto logits_at = [&](float weight_x) {
        const Source column{walk.column.low, walk.column.high, weight_x};
        return Sampled<float, true>(call, call.logits, place.image, source_row, column);
      };
      rows.interpolate(logits_at(0.0f), first_class, lane);
      float left[K], sum[K] = {}, right[K] = {}, spread = 0, spread_right = 0;
#pragma unroll
      for (int i = 0; i < K; ++i) left[i] = i < classes ? rows.left[i * kCells + lane] : -kInfinity;
      const int64_t pixel_row = place.image * call.target.height + y;
      walk.each([&](int x, float weight_x) {
        const int64_t at = pixel_row * call.target.width + x;
        Labels labels{target.known(target.read(y, x)), -1, -1};
        const float u = target.weight(y, x);
        if (labels.own < 0 && !is_distilled(call, labels, u)) return;
        const bool selected = labels.own >= 0 && is_selected(call, scratch, place.image, y, x);
        if (selected) labels = target.of_term(y, x);
        const float shift = Softmax<K>::shift_of(scratch.best[at]), log_sum = kLog2E * scratch.lse[at];
        const float scale = exp2_of(-log_sum), inner = shares.slopes != nullptr ? scratch.inner[at] : 0.0f;
        const auto logit_of = [&](int i) { return fmaf(weight_x, rows.step[i * kCells + lane], left[i]); };
        float z[K];
#pragma unroll
        for (int i = 0; i < K; ++i) z[i] = i < classes ? exp2_of(exponent(logit_of(i), shift)) : 0.0f;
        // A label may be of another group of classes, which this block does not hold.
        const float weight = labels.own >= 0 ? u * weight_of_class(call, labels.own) : 0.0f;
        const PixelGradient pixel(call, shares, labels, u, weight, selected, inner, [&](int label) {
          return exponent(logits_at(weight_x)(label), shift) - log_sum;
        });
        const auto take = [&](int label, float amount) {
          const int i = label - first_class;
          if (amount != 0 && i >= 0 && i < classes) rows.take(i, lane, weight_x, amount);
        };
        if (pixel.counts) {
          const float each = pixel.amounts.total * scale, sloped = pixel.overlap * scale;
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
          const auto teacher = teacher_at(
              call, place.image, source_row, {walk.column.low, walk.column.high, weight_x}, y, x);
          const Tempered student(call, scratch.best[at], scratch.student_lse[at]);
          const Tempered taught(call, scratch.teacher_best[at], scratch.teacher_lse[at]);
          for (int i = 0; i < classes; ++i) {
            const float from = rows.left[i * kCells + lane], step = rows.step[i * kCells + lane];
            const float s = exp2_of(student(fmaf(weight_x, step, from))), t = exp2_of(taught(teacher(first_class + i)));
            rows.take(i, lane, weight_x, pixel.distillation * (t - s));
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
  const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  const int64_t at = (block * call.logits.channels + first_class) * kNodes;
  for (int i = threadIdx.x; i < classes * kNodes; i += blockDim.x)
    scratch.parts.upper[at + i] = rows.upper[i], scratch.parts.lower[at + i] = rows.lower[i];
}

}  // namespace

int launch_cell_scores(const Bcl& call, const Scratch& scratch, void* stream) {
  if (is_wide(call)) return launch_term_scores(call, scratch, stream);
  return by_classes_of_terms(call, [&](auto k, auto) {
    constexpr int K = decltype(k)::value;
    const auto kernel = is_plain(call) ? column_scores_kernel<K, true> : column_scores_kernel<K, false>;
    const int tallied = has_overlap(call.options) ? static_cast<int>(classes_of(call)) : 0;
    const int bytes = static_cast<int>(sizeof(Corners)) * K * kNodes + Tally::bytes(tallied, kWarps * 32);
    return launch_with_shared(kernel, cell_grid(call), kWarps * 32, bytes, stream, call, scratch);
  });
}

int launch_cell_gradient(const Bcl& call, const Scratch& scratch, void* stream) {
  if (is_wide(call)) {
    constexpr int kBytes = 4 * kMostClasses * (4 * kWarps * kCells + 2 * kNodes);
    if (has_overlap(call.options)) BCM_TRY(launch_inner(call, scratch, stream));
    return launch_with_shared(group_gradient_kernel, cell_grid(call), kWarps * 32, kBytes, stream, call, scratch);
  }
  return by_classes_of_terms(call, [&](auto k, auto) {
    constexpr int K = decltype(k)::value;
    const auto kernel = is_plain(call) ? column_gradient_kernel<K, true> : column_gradient_kernel<K, false>;
    const int bytes = K * (static_cast<int>(sizeof(Corners)) * kNodes + 8 * slot_of(kColumnsHeld<K>));
    return launch_with_shared(kernel, cell_grid(call), kWarps * 32, bytes, stream, call, scratch);
  });
}

}  // namespace bcmfnet
