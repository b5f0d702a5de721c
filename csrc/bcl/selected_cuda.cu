// The selected pixels of upsampled logits: their boundary term, and its gradient.
#include "bcl/columns_cuda.h"

namespace bcmfnet {
namespace {

// What a class has of a cell's pixels: their gradient, and its parts of the right source column, of the lower row, and
// of both.
struct alignas(16) Corners {
  float sum, right, below, below_right;
};

// The parts that a pixel has of its cell's right source column, of the lower row, and of both; and where its row of cells
// begins among the corners.
struct alignas(16) Point {
  float right, below, below_right;
  int at;
};

// Bit i of what lane j has, as bit j of lane i.
__device__ unsigned transposed(unsigned bits) {
  const int lane = threadIdx.x % 32;
  unsigned mask = 0x0000ffff;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2, mask ^= mask << lanes) {
    const unsigned other = __shfl_xor_sync(kFullWarp, bits, lanes);
    bits = lane & lanes ? (bits & ~mask) | (other >> lanes & mask) : (bits & mask) | (other << lanes & ~mask);
  }
  return bits;
}

constexpr int kAtOnce = kWarps * 32;  // pixels; columns that are listed together
constexpr int kListedRows = 32;       // so are these

// The selected pixels alone: their boundary term, and its gradient. A block lists those of its cells in the order of
// their columns. Each lane then takes one of them; then, for the gradient, a class of all that lie in one cell.
template <int K, bool kExact, bool kGradient>
__global__ void __launch_bounds__(kAtOnce, K > 19 ? 2 : kExact ? 4 : 3) selected_kernel(
    const Bcl call, const Scratch scratch) {
  BCM_DYNAMIC_SHARED(Corners, corners);  // [rows, 1 + cells + 1, classes]: to either side is nothing
  __shared__ __align__(16) int edges[CellBlock::kEdges];
  __shared__ int starts[kAtOnce + 1];               // of a column in the list
  __shared__ __align__(16) int counts[kWarps];      // of a warp's columns; the compiler reads 16 bytes at once
  __shared__ uint16_t list[kAtOnce * kListedRows];  // column * kListedRows + row
  __shared__ Point points[kAtOnce];
  const int classes = kExact ? K : min(K, static_cast<int>(call.logits.channels)), pitch = classes | 1;
  const CellBlock block(call, scratch.tile, edges);
  const int cells = block.tile.cells, nodes = block.tile.nodes, rows = block.rows();
  const int of_row = (cells + 2) * classes, all_corners = kGradient ? block.tile.rows * of_row : 0;
  // [rows, classes, nodes]: at the upper source row, at the lower one
  float2* const exponents = reinterpret_cast<float2*>(corners + all_corners);
  float* const values = reinterpret_cast<float*>(exponents + block.tile.rows * classes * nodes);  // [kAtOnce, pitch]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();

  const int end_y = block.end_y(rows - 1), end_x = block.end_x();
  const Across across(block);
  const Down first_down(block);
  const float* const terms = call.options.terms;
  const float nats = nats_of(classes);
  const int threshold = selects(call) ? scratch.factors->threshold[call.options.per_image ? block.image : 0] : 0;
  const float of_boundary = selects(call) ? scratch.factors->divisors.boundary_factor : 0.0f;
  float sum = 0;
  bool found = false;

  // Of a column, as bits: a lane reads a row, and the warp turns what it has.
  const auto selected_rows = [&](int x, int first_y, int last_y) {
    if (!selects(call)) return 0u;
    const int y = first_y + lane;
    const unsigned left = x - lane;
    const int64_t row = block.image * call.target.height + first_y;
    unsigned own = 0, right = 0;
    if (y < last_y && left < static_cast<unsigned>(end_x)) {
      const uint32_t* const words = scratch.candidates + (row + lane) * scratch.words + left / 32;
      own = words[0], right = left / 32 + 1 < scratch.words ? words[1] : 0;
    }
    unsigned rows = transposed(__funnelshift_r(own, right, left % 32));
    if (x >= end_x) rows = 0;
    if (!by_rank(call.options.selection)) return rows;
    for (unsigned bits = rows; bits != 0; bits &= bits - 1) {
      const int below = __ffs(bits) - 1;
      if (scratch.score[(row + below) * scratch.score_pitch + x] < threshold) rows &= ~(1u << below);
    }
    return rows;
  };
  const auto read_exponents = [&] {
    for (int i = threadIdx.x; i < (rows + 1) * nodes; i += kAtOnce) {
      const int below = i / nodes, node = i % nodes;
      float of_node[K];
      exponents_of<K>(
          block, classes, below == 0 ? block.row : block.lower_row(below - 1),
          smaller_of<int64_t>(block.first_cell + node, call.logits.width - 1), of_node);
      float2* const to = exponents + below * classes * nodes + node;
#pragma unroll
      for (int c = 0; c < K; ++c) {
        if (c < classes && below < rows) to[c * nodes].x = of_node[c];
        if (c < classes && below > 0) to[(c - classes) * nodes].y = of_node[c];
      }
    }
  };
  const auto clear_corners = [&] {
    for (int i = threadIdx.x; i < all_corners; i += kAtOnce) corners[i] = Corners{};
  };
  const auto evaluate = [&](int x, int y) {
    int row = 0;
    while (y >= block.end_y(row)) ++row;
    Down down = first_down;
    down.go_to(row);
    const Across::Column column = across(x);
    const float weight_y = down(y);
    const float2* const of_cells = exponents + row * classes * nodes;
    const auto exponent_of = [&](int i) {
      const float2 line = line_of(of_cells + i * nodes, column);
      return fmaf(weight_y, line.y - line.x, line.x);
    };
    float z[K];
#pragma unroll
    for (int i = 0; i < K; ++i) z[i] = i < classes ? exponent_of(i) : -kInfinity;
    const Exponentials<K> softmax([&](int i) { return z[i]; });
    const float log_sum = log2_of(softmax.total);
    const uint8_t* const code = scratch.codes + (block.image * call.target.height + y) * scratch.score_pitch + x;
    const Labels labels{code[0] - 1, terms[1] != 0 ? code[scratch.other_rows[y]] - 1 : -1,
                        terms[2] != 0 ? code[scratch.other_columns[x]] - 1 : -1};
    const CrossEntropies ce(labels, [&](int label) {
      return cross_entropy(nats, log_sum, exponent_of(label) - softmax.shift);
    });
    const float weight = class_weight_of(call, labels.own);
    sum += times_weight(weight, ce.sum(terms));
    if (!kGradient) return;
    const Amounts<float> amounts = bcmfnet::amounts_of(
        terms, 0.0f, weight * of_boundary, labels.rows >= 0, labels.columns >= 0);
    const float each = amounts.total * reciprocal_of(softmax.total);
    float* const to = values + threadIdx.x * pitch;
#pragma unroll
    for (int i = 0; i < K; ++i)
      if (i < classes) to[i] = each * softmax.z[i];
    const auto take = [&](int label, float amount) {
      if (amount != 0) to[label] -= amount;
    };
    take(labels.own, amounts.own), take(labels.rows, amounts.rows), take(labels.columns, amounts.columns);
    points[threadIdx.x] = {column.weight, weight_y, column.weight * weight_y, row * of_row};
  };
  // Adds `count` pixels, those of the list from `first` on. A cell may have thousands: where all lie in one row of cells
  // they are added up apart.
  const auto fold = [&](int first_x, int first, int count, bool one_row) {
    for (int cell = warp; cell < cells; cell += kWarps) {
      const auto start_of = [&](int edge) { return starts[min(max(edge - first_x, 0), kAtOnce)] - first; };
      const int begin = max(start_of(edges[cell]), 0), end = min(start_of(edges[cell + 1]), count);
      if (begin >= end || lane >= classes) continue;
      Corners* const of_class = corners + (1 + cell) * classes + lane;
      const float* value = values + begin * pitch + lane;
      const auto add = [&](Corners& to, const Point& part) {
        to = {to.sum + *value, fmaf(part.right, *value, to.right), fmaf(part.below, *value, to.below),
              fmaf(part.below_right, *value, to.below_right)};
        value += pitch;
      };
      if (one_row) {
        Corners sum{};
        for (int i = begin; i < end; ++i) add(sum, points[i]);
        Corners& to = of_class[points[begin].at];
        to = {to.sum + sum.sum, to.right + sum.right, to.below + sum.below, to.below_right + sum.below_right};
      } else {
        for (int i = begin; i < end; ++i) add(of_class[points[i].at], points[i]);
      }
    }
  };

  for (int first_x = block.begin_x(); first_x < end_x; first_x += kAtOnce) {
    for (int first_y = block.begin_y(); first_y < end_y; first_y += kListedRows) {
      const int last_y = min(first_y + kListedRows, end_y);
      bool one_row = true;
      for (int row = 1; row < rows; ++row) one_row &= block.begin_y(row) <= first_y || block.begin_y(row) >= last_y;
      const unsigned selected = selected_rows(first_x + static_cast<int>(threadIdx.x), first_y, last_y);
      const int count = __popc(selected);
      int at = count;  // after this lane's column, then before it
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int before = __shfl_up_sync(kFullWarp, at, lanes);
        at += lane >= lanes ? before : 0;
      }
      if (lane == 31) counts[warp] = at;
      __syncthreads();
      at -= count;
      int all = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) at += i < warp ? counts[i] : 0, all += counts[i];
      if (threadIdx.x == 0) starts[kAtOnce] = all;
      starts[threadIdx.x] = at;
      for (unsigned bits = selected; bits != 0; bits &= bits - 1)
        list[at++] = static_cast<uint16_t>(static_cast<int>(threadIdx.x) * kListedRows + __ffs(bits) - 1);
      if (all != 0 && !found) {
        found = true;
        read_exponents();
        clear_corners();
      }
      __syncthreads();
      for (int first = 0; first < all; first += kAtOnce) {
        const int i = first + static_cast<int>(threadIdx.x);
        if (i < all) evaluate(first_x + list[i] / kListedRows, first_y + list[i] % kListedRows);
        if (!kGradient) continue;
        __syncthreads();
        fold(first_x, first, min(all - first, kAtOnce), one_row);
        __syncthreads();
      }
    }
  }
  if (selects(call)) write_sum(sum, scratch.boundary + block_number());
  // Without a gradient of the cross-entropy nothing has been written yet.
  const bool adds = call.options.ce_weight != 0;
  if (!kGradient || (adds && !found)) return;
  if (!found) {
    clear_corners();
    __syncthreads();
  }
  const int step = static_cast<int>(gridDim.y) * classes * nodes, first = static_cast<int>(blockIdx.y) * classes * nodes;
  float* const to_upper = scratch.parts.upper + (block.image * call.logits.height + block.row) * step + first;
  float* const to_lower = scratch.parts.lower + static_cast<int64_t>(blockIdx.x) * step + first;
  const int of_cells = classes * cells, shift = __ffs(cells) - 1;  // there are 2^shift cells
  for (int i = threadIdx.x; i < classes * nodes; i += kAtOnce) {
    const bool is_right = i >= of_cells;  // the node to the right of the last cell
    const int c = is_right ? i - of_cells : i >> shift, node = is_right ? cells : i & (cells - 1);
    const auto add = [&](float* to, float value) { *to = (adds ? *to : 0.0f) + value; };
    // In the last block that node is the one of other columns.
    const Corners *own = corners + (1 + node) * classes + c, *left = own - classes;
    if (is_right && block.first_cell + cells >= call.logits.width) left = own;
    float *upper = to_upper + c * nodes + node, from_above = 0;
#pragma unroll
    for (int row = 0; row < kCellRows; ++row, upper += step, own += of_row, left += of_row) {
      if (row == rows) break;
      const float below = (own->below - own->below_right) + left->below_right;
      add(upper, (own->sum - own->right) + left->right - below + from_above);
      from_above = below;
    }
    add(to_lower + c * nodes + node, from_above);
  }
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
  const float nats = nats_of(call.logits.channels);
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
              return cross_entropy(nats, softmax.log_sum, exponent(logit(label), softmax.shift));
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
    scratch.parts.upper[at + i] = rows.upper[i], scratch.parts.lower[at + i] = rows.lower[i];
  }
}

int launch_narrow_selected(const Bcl& call, const Scratch& scratch, bool gradient, void* stream) {
  const int classes = static_cast<int>(call.logits.channels);
  const CellTile& tile = scratch.tile;
  const int nodes = 8 * tile.rows * classes * tile.nodes;
  const int of_gradient = static_cast<int>(sizeof(Corners)) * tile.rows * (tile.cells + 2) * classes + 4 * kAtOnce * (classes | 1);
  return by_classes(call.logits.channels, [&](auto k) {
    constexpr int K = decltype(k)::value;
    const auto launch = [&](auto exact) {
      constexpr bool kExact = decltype(exact)::value;
      const auto kernel = gradient ? selected_kernel<K, kExact, true> : selected_kernel<K, kExact, false>;
      return launch_with_shared(
          kernel, cell_grid(call), kAtOnce, nodes + (gradient ? of_gradient : 0), stream, call, scratch);
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

int launch_selected(const Bcl& call, const Scratch& scratch, bool gradient, void* stream) {
  if (is_wide(call) && gradient) return launch_groups<true>(call, scratch, stream);
  if (is_wide(call)) return selects(call) ? launch_groups<false>(call, scratch, stream) : 0;
  const bool first = gradient && call.options.ce_weight == 0;  // nothing has been written yet
  return selects(call) || first ? launch_narrow_selected(call, scratch, gradient, stream) : 0;
}

}  // namespace bcmfnet
