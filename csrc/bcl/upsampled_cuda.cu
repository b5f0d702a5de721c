// The room of upsampled logits. What is done at a pixel of a cell is a Pass.
#include "bcl/columns_cuda.h"

namespace bcmfnet {
namespace {

constexpr float kAbsent = 0x1p120f;    // the exponent of a label that there is not: its cross-entropy is then 0
constexpr int kColumns = kWarps * 32;  // that a block has at once: a thread has one

// Where a column lies in shared memory: those of 8 at a time meet different banks.
__host__ __device__ constexpr int slot_in_banks(int column) { return column ^ (column >> 3 & 7); }

// Of a label in a column: its exponents at the upper source row and on to the lower one, or what the column gives to the
// upper row of nodes, of each set; and what it adds to the sums of the first set, to begin with what the rows above give to
// that row of nodes.
struct alignas(16) Line {
  float2 exponents;
  float2 taken;
};

// What the columns of a block share.
template <int K, int kSets>
struct Columns {
  float2* pairs;     // [2, K, kNodes]: exponents of a row of nodes, by its parity: at a node, at the one to its right
  Line* lines;       // [1 + K, kColumns], the first label of which is absent
  float2* chosen;    // [K, kColumns]: what classes add to the sums of the second set
  float* weights_x;  // [kColumns]
  float* weights;    // [1 + K], of classes

  __device__ explicit Columns(Line* shared)
      : pairs(reinterpret_cast<float2*>(shared + (1 + K) * kColumns)), lines(shared), chosen(pairs + 2 * K * kNodes),
        weights_x(reinterpret_cast<float*>(chosen + (kSets - 1) * K * kColumns)), weights(weights_x + kColumns) {}
  static constexpr int bytes() {
    return 16 * (1 + K) * kColumns + 8 * K * (2 * kNodes + (kSets - 1) * kColumns) + 4 * (kColumns + 1 + K);
  }

  // Reads a row of nodes, that of `below` rows of cells further down. Returns whether an exponent is steep.
  __device__ bool read(const CellBlock& block, int classes, int below, int node) const {
    if (node < 0 || node >= block.tile.nodes) return false;
    const int64_t cell = block.first_cell + node, width = block.call.logits.width;
    const auto has_right = [&](int64_t cell) { return high_of(cell, width, block.call.target.width) != cell; };
    float exponents[K];
    const int64_t row = below == 0 ? block.row : block.lower_row(below - 1);
    // The last node of the last block is that of the leading columns.
    const bool leads = node == block.tile.cells && cell >= width;
    const float least = exponents_of<K>(block, classes, row, leads ? 0 : smaller_of(cell, width - 1), exponents);
    const bool is_right = node > 0 && has_right(cell - 1), alone = leads || !has_right(cell);
    const bool is_left = leads || node < block.tile.cells;
    float2* const to = pairs + below % 2 * K * kNodes + node;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if (i >= classes) continue;
      if (is_right) to[i * kNodes - 1].y = exponents[i];
      if (is_left) to[i * kNodes].x = exponents[i];
      if (is_left && alone) to[i * kNodes].y = exponents[i];
    }
    return Exponentials<K>::is_steep(least);
  }
  __device__ float exponent_of(int i, int below, const Across::Column& column) const {
    const float2 pair = pairs[(below % 2 * K + i) * kNodes + column.node];
    return fmaf(column.weight, pair.y - pair.x, pair.x);
  }
};

constexpr int kFolding = kColumns / 2;  // threads that fold: half of a block, so that each has more to do in a column

// Adds what the columns from `begin` to `end`, those of a thread's cell, give to a row of nodes: of some of the classes.
// It is where their lines were. But for the `first` columns it is added to what those before have given. Only a block that
// is not the last one in its row has a node to the right of its last cell.
template <int K, int kSets, int kAcross>
__device__ void fold(
    const Columns<K, kSets>& columns, int classes, int thread, int begin, int end, bool first, bool is_last,
    float* const (&nodes)[kSets]) {
  constexpr int kNodes = kAcross + 1;
  constexpr int kGroups = kFolding / kAcross, kOfThread = (K + kGroups - 1) / kGroups;
  const int cell = thread % kAcross, group = thread / kAcross;
  const Line* const lines = columns.lines + (1 + group) * kColumns;
  float sum[kSets][kOfThread] = {}, right[kSets][kOfThread] = {};
  for (int column = begin; column < end; ++column) {
    const int slot = slot_in_banks(column);
    const float weight = columns.weights_x[column];
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      if (group + i * kGroups >= classes) continue;
      const float2& value = lines[i * kGroups * kColumns + slot].exponents;
      sum[0][i] += value.x, right[0][i] = fmaf(weight, value.x, right[0][i]);
      if constexpr (kSets == 2) sum[1][i] += value.y, right[1][i] = fmaf(weight, value.y, right[1][i]);
    }
  }
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    float* const to = nodes[set] + group * kNodes + cell;
    const auto add = [&](int i, int node, float value) {
      float& at = to[i * kGroups * kNodes + node];
      if (group + i * kGroups < classes) at = first ? value : at + value;
    };
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const float from_left = __shfl_up_sync(kFullWarp, right[set][i], 1, kAcross);
      float own = sum[set][i] - right[set][i];
      if (cell > 0) own += from_left;
      add(i, 0, own);
    }
    if (cell == kAcross - 1 && !is_last) {
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) add(i, 1, right[set][i]);
    }
  }
}

// The same of the leading columns, which are those of one node: a thread has a class.
template <int K, int kSets>
__device__ void fold_leading(
    const Columns<K, kSets>& columns, int c, int begin, int end, bool first, float* const (&nodes)[kSets]) {
  float2 sum = make_float2(0.0f, 0.0f);
  for (int column = begin; column < end; ++column) {
    const float2 value = columns.lines[(1 + c) * kColumns + slot_in_banks(column)].exponents;
    sum.x += value.x, sum.y += value.y;
  }
  *nodes[0] = first ? sum.x : *nodes[0] + sum.x;
  if constexpr (kSets == 2) *nodes[1] = first ? sum.y : *nodes[1] + sum.y;
}

// A pass scores the pixels, and adds up the gradient of their cross-entropy. Cross-entropies are in bits until their
// sums are written.
struct ScorePass {
  static constexpr bool kDecides = false;
  const Bcl& call;
  const Scratch& scratch;
  const float nats;
  const float coefficients[3];    // of the score, in steps of its grid
  const uint8_t* code = nullptr;  // the label of the pixel,
  uint16_t* at = nullptr;         // its score,
  int y = 0, other_column = 0;    // its row, and how far it is to the label that a flip of the column reads
  float ces = 0, scores = 0;      // sums of a row of cells; the scores are added up where there is no gradient
  double sum = 0;
  unsigned flags = 0;

  __device__ ScorePass(const Bcl& call, const Scratch& scratch)
      : call(call), scratch(scratch), nats(nats_of(call.logits.channels)),
        coefficients{kScoreUnit * nats * call.options.score[0], kScoreUnit * nats * call.options.score[1],
                     kScoreUnit * nats * call.options.score[2]} {}
  __device__ void begin_column(int first_y, int x, int64_t image) {
    const int64_t first = (image * call.target.height + first_y) * scratch.score_pitch + x;
    y = first_y, code = scratch.codes + first, at = scratch.score + first;
    other_column = selects(call) && x < call.target.width ? scratch.other_columns[x] : 0;
  }
  // The labels of the pixel, each + 1, or 0 where there is none.
  __device__ int own() const { return *code; }
  __device__ int of_rows() const { return code[scratch.other_rows[y]]; }
  __device__ int of_columns() const { return code[other_column]; }
  // In steps of its grid, before it is cut to an integer. Labels of flips that have no coefficient are absent.
  __device__ float score(const CrossEntropies& ce) const {
    const float score = fmaf(coefficients[2], ce.columns, fmaf(coefficients[1], ce.rows, 0.5f));
    return coefficients[0] != 0 ? fmaf(coefficients[0], ce.own, score) : score;
  }
  __device__ void keep(float score) { *at = cut_to_grid(score); }
  __device__ void keep_none() {
    if (selects(call)) *at = 0;
  }
  __device__ void end_pixel() { code += scratch.score_pitch, at += scratch.score_pitch, ++y; }
  __device__ float next_share() const { return 0; }
  // `spoilt` is NaN where a score was.
  __device__ float end_rows(float spoilt) {
    sum += nats * ces, flags |= isnan(spoilt) ? kNan : 0, ces = scores = 0;
    return 0;
  }
  __device__ void finish() const { write_scored(sum, flags, scratch.scored + block_number()); }
};

// The same where the score decides: also the boundary term of the selected pixels, and its gradient. That is a share of
// the cross-entropy's, all the coefficients or nothing: a column keeps what its pixels deviate from the share that the
// last one of the row of cells above had, so that most cost nothing.
struct DecidingPass : ScorePass {
  static constexpr bool kDecides = true;
  const float least, whole;
  const bool mixes;                  // labels of flips have a gradient
  float share = __builtin_nanf("");  // of `whole`, in the row of cells; not known before the first pixel
  float last = 0;                    // of the last pixel: 1 where it is selected
  float selected = 0;                // pixels of a column
  int all_selected = 0;
  float boundary = 0;

  __device__ DecidingPass(const Bcl& call, const Scratch& scratch)
      : ScorePass(call, scratch), least(once(static_cast<float>(max(call.options.selection.tau, 1)))),
        whole(once((call.options.terms[0] + call.options.terms[1]) + call.options.terms[2])),
        mixes(once(call.options.terms[1] != 0 || call.options.terms[2] != 0)) {}
  __device__ void keep_none() {}
  __device__ void begin_column(int first_y, int x, int64_t image) {
    ScorePass::begin_column(first_y, x, image);
    all_selected += static_cast<int>(selected), selected = 0;
    share = __builtin_nanf(""), last = 0;
  }
  // Returns whether a pixel adds to what deviates.
  __device__ bool add(const CrossEntropies& ce, float weight, float score, bool labels_differ) {
    const bool selects = score >= least;
    last = selects ? 1.0f : 0.0f, selected += last;
    if (isnan(share)) share = last;
    if (!mixes) {
      if (selects && weight != 0) boundary = fmaf(weight, ce.own, boundary);
      return last != share;
    }
    boundary += selects ? times_weight(weight, ce.sum(call.options.terms)) : 0.0f;
    return last != share || (selects && labels_differ);
  }
  // What a pixel with a weight of 1 adds beyond the share.
  __device__ Amounts<float> deviation(const Labels& labels) const {
    const float* const terms = call.options.terms;
    const float expected = share * whole;
    const bool selects = last != 0;
    Amounts<float> amounts;
    amounts.own = selects ? terms[0] : 0.0f;
    amounts.rows = selects && labels.rows >= 0 ? terms[1] : 0.0f;
    amounts.columns = selects && labels.columns >= 0 ? terms[2] : 0.0f;
    amounts.total = ((amounts.own + amounts.rows) + amounts.columns) - expected, amounts.own -= expected;
    return amounts;
  }
  // Returns the share of the rows that end, in units of the coefficients; then it is that of the next.
  __device__ float end_rows(float spoilt) {
    ScorePass::end_rows(spoilt);
    const float ended = isnan(share) ? 0.0f : share;
    share = last;
    return ended * whole;
  }
  __device__ float next_share() const { return share * whole; }
  __device__ void finish() const {
    __shared__ int integers[kWarps];
    ScorePass::finish();
    write_sum(nats * (mixes ? boundary : whole * boundary), scratch.boundary + block_number());
    const int all = sum_of_block(all_selected + static_cast<int>(selected), integers);
    const int64_t image = blockIdx.x / scratch.tile.strips;
    if (threadIdx.x == 0 && all != 0)
      atomicAdd(&scratch.histogram[call.options.per_image ? image : 0].high[0], static_cast<uint32_t>(all));
  }
};

// Gradients that a pass adds up apart.
template <typename Visit>
constexpr int kSetsOf = Visit::kDecides ? 2 : 1;

// Of K classes exactly, or of at most so many.
template <typename Visit, int K, bool kExact, bool kGradient>
__global__ void __launch_bounds__(kColumns, K <= 19 && kExact ? kResident : 2) columns_kernel(
    const Bcl call, const Scratch scratch) {
  constexpr int kSets = kGradient ? kSetsOf<Visit> : 1;
  constexpr bool kHolds = K <= 19;  // a row of nodes in registers; else it is read again
  using Shared = Columns<K, kSets>;
  BCM_DYNAMIC_SHARED(Line, shared);
  __shared__ __align__(16) int edges[CellBlock::kEdges];
  const int classes = kExact ? K : min(K, static_cast<int>(call.logits.channels));
  const int lane = threadIdx.x % 32, slot = slot_in_banks(threadIdx.x);
  const Shared columns(shared);
  const CellBlock block(call, scratch.tile, edges);
  if (threadIdx.x < classes) columns.weights[1 + threadIdx.x] = class_weight_of(call, threadIdx.x);
  __syncthreads();

  // Columns count on beyond the image, where the leading ones follow.
  const int rows = block.rows(), width = static_cast<int>(call.target.width);
  const bool is_last = blockIdx.y + 1 == gridDim.y;
  const int begin_x = blockIdx.y == 0 ? block.tile.leading : block.begin_x();
  const int end_x = is_last ? width + block.tile.leading : block.end_x();
  const Across across(block);
  Down down(block);
  const bool selects_any = Visit::kDecides || selects(call);
  // Of a class in the thread's column; those of a flip's label, which is absent where the score has no coefficient for it.
  Line* const lines = columns.lines + slot;
  float2* const chosen = columns.chosen + slot;
  constexpr int kEach = kColumns * sizeof(Line);
  const auto line_at = [&](int bytes) -> Line& {
    return *reinterpret_cast<Line*>(reinterpret_cast<char*>(lines) + bytes);
  };
  const int of_rows = once(call.options.score[1] != 0 ? kEach : 0);
  const int of_columns = once(call.options.score[2] != 0 ? kEach : 0);
  Visit pass(call, scratch);

  for (int first_x = begin_x; first_x < end_x; first_x += kColumns) {
    const int along = first_x + static_cast<int>(threadIdx.x), x = along < width ? along : along - width;
    const bool inside = along < end_x, is_busy = along - lane < end_x;
    const auto fold_to = [&](bool upper, int64_t row, int thread) {
      if constexpr (kGradient) {
        const int64_t to = (row * gridDim.y + blockIdx.y) * classes * block.tile.nodes;
        float* nodes[kSets] = {(upper ? scratch.parts.upper : scratch.parts.lower) + to};
        if constexpr (kSets == 2) nodes[1] = (upper ? scratch.chosen.upper : scratch.chosen.lower) + to;
        if (thread >= kFolding) {
          const int c = thread - kFolding, held = end_x - first_x;
          if (!is_last || c >= classes) return;
          for (float*& set : nodes) set += c * block.tile.nodes + block.tile.cells;
          return fold_leading(
              columns, c, max(held - block.tile.leading, 0), min(held, kColumns), first_x == begin_x, nodes);
        }
        const auto fold_cells = [&](auto across) {
          constexpr int kAcross = decltype(across)::value;
          const int cell = thread % kAcross;
          const int begin = max(edges[cell] - first_x, 0), end = min(edges[cell + 1] - first_x, kColumns);
          fold<K, kSets, kAcross>(columns, classes, thread, begin, end, first_x == begin_x, is_last, nodes);
        };
        if (block.tile.cells == 8) return fold_cells(std::integral_constant<int, 8>());
        if (block.tile.cells == 16) return fold_cells(std::integral_constant<int, 16>());
        fold_cells(std::integral_constant<int, kCells>());
      }
    };
    Across::Column column = across(x);
    if (inside && along != x) column.node = block.tile.cells;
    columns.weights_x[threadIdx.x] = column.weight;
    const int half = static_cast<int>(threadIdx.x) % kFolding, of_half = static_cast<int>(threadIdx.x) / kFolding;
    bool steep = columns.read(block, classes, of_half, half);
    lines[0].exponents = make_float2(kAbsent, 0.0f);
    pass.begin_column(block.begin_y(), x, block.image);
    steep = __syncthreads_or(steep) != 0;
    float from[K];  // exponents at the upper source row
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if (kHolds) from[i] = is_busy && i < classes ? columns.exponent_of(i, 0, column) : -kInfinity;
      lines[(1 + i) * kColumns].taken = make_float2(0.0f, 0.0f);
      if constexpr (kSets == 2) chosen[i * kColumns] = make_float2(0.0f, 0.0f);
    }
    for (int row = 0; row < rows; ++row) {
      down.go_to(row);
      if (is_busy) {
        // Along a run exponentials follow from those above: each is the one before times a ratio.
        float sum[K] = {}, below[K] = {};  // the gradient of the column, and the part of the lower source row
        const int end_y = inside ? down.end : 0;
        float z[K], ratio[K], shift = 0, weight_y = down(down.begin), step = down.step_of(down.begin);
        const auto start = [&](int i, float2 line) {
          z[i] = fmaf(weight_y, line.y, line.x), ratio[i] = exp2_of(step * line.y);
        };
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const auto read = [&](int row) { return i < classes ? columns.exponent_of(i, row, column) : -kInfinity; };
          const float upper = kHolds ? from[i] : read(row);
          from[i] = read(row + 1);
          const float2 line = make_float2(upper, i < classes ? from[i] - upper : 0.0f);
          lines[(1 + i) * kColumns].exponents = line;
          start(i, line);
          if (i % 10 == 9) __syncwarp();  // the compiler would else hold more of them than there are registers for
        }
        const auto visit = [&] {
          const int own = pass.own();
          if (own == 0) return pass.keep_none();
          float total = z[0];
#pragma unroll
          for (int i = 1; i < K; ++i) total += z[i];
          const float log_sum = log2_of(total) + shift, part = reciprocal_of(total);
          const auto ce_of = [&](const Line& line) {
            const float2 at = line.exponents;
            return at_least_0(log_sum - fmaf(weight_y, at.y, at.x));  // below is a rounding
          };
          const auto take = [&](float2& from, float amount) {
            from = make_float2(from.x - amount, fmaf(-weight_y, amount, from.y));
          };
          const float weight = columns.weights[own];
          Line& line = line_at(own * kEach);
          CrossEntropies ce;
          ce.own = ce_of(line);
          if (weight != 0) pass.ces = fmaf(weight, ce.own, pass.ces);
          if (selects_any) {
            const int rows = pass.of_rows(), columns = pass.of_columns();
            ce.rows = ce_of(line_at(rows * of_rows)), ce.columns = ce_of(line_at(columns * of_columns));
            const float score = pass.score(ce);
            if (!kGradient) pass.scores += score;
            if constexpr (!Visit::kDecides) {
              pass.keep(score);
            } else if (pass.add(ce, weight, score, own != rows || own != columns) && kGradient) {
              const Amounts<float> amounts = pass.deviation({own - 1, rows - 1, columns - 1});
              take(chosen[(own - 1) * kColumns], weight * amounts.own);
              if (amounts.rows != 0) take(chosen[(rows - 1) * kColumns], weight * amounts.rows);
              if (amounts.columns != 0) take(chosen[(columns - 1) * kColumns], weight * amounts.columns);
              if (amounts.total != 0) {
                const float each = weight * amounts.total * part, each_below = each * weight_y;
#pragma unroll
                for (int i = 0; i < K; ++i) {
                  float2& at = chosen[i * kColumns];
                  at = make_float2(fmaf(each, z[i], at.x), fmaf(each_below, z[i], at.y));
                }
              }
            }
          }
          if constexpr (kGradient) {
            const float each = weight * part, each_below = each * weight_y;
#pragma unroll
            for (int i = 0; i < K; ++i) {
              sum[i] = fmaf(each, z[i], sum[i]), below[i] = fmaf(each_below, z[i], below[i]);
            }
            take(line.taken, weight);
          }
        };
        for (;;) {
          if (steep) {
            shift = -kInfinity;
#pragma unroll
            for (int i = 0; i < K; ++i) shift = fmaxf(shift, z[i]);
#pragma unroll
            for (int i = 0; i < K; ++i) z[i] -= shift;
          }
#pragma unroll
          for (int i = 0; i < K; ++i) z[i] = exp2_of(z[i]);
          const int rows_of_run = steep ? 1 : down.rows(pass.y);
          for (const int end = min(pass.y + rows_of_run, end_y); pass.y < end; weight_y += step) {
            visit();
            pass.end_pixel();
#pragma unroll
            for (int i = 0; i < K; ++i) z[i] *= ratio[i];
          }
          if (pass.y >= end_y) break;
          weight_y = down(pass.y), step = down.step_of(pass.y);
#pragma unroll
          for (int i = 0; i < K; ++i) start(i, lines[(1 + i) * kColumns].exponents);
        }
        const float share = pass.end_rows(kGradient ? sum[0] : pass.scores), changed = pass.next_share() - share;
        if constexpr (kGradient) {
#pragma unroll
          for (int i = 0; i < K; ++i) {
            Line& line = lines[(1 + i) * kColumns];
            const float lower = below[i] + line.taken.y, upper = (sum[i] + line.taken.x) - lower;
            float2 value = make_float2(upper, 0.0f);
            if constexpr (kSets == 2) {
              float2& own = chosen[i * kColumns];
              value.y = fmaf(share, upper, own.x - own.y);
              own = make_float2(fmaf(-changed, lower, own.y), 0.0f);
            }
            line = {value, make_float2(lower, 0.0f)};
          }
        }
      }
      __syncthreads();
      // One half of the block folds, the other one reads; they take turns.
      const int thread = (static_cast<int>(threadIdx.x) + row % 2 * kFolding) % kColumns;
      const bool is_steep = row + 1 < rows && columns.read(block, classes, row + 2, thread - kFolding);
      fold_to(true, block.image * call.logits.height + block.row + row, thread);
      if (__syncthreads_or(is_steep)) steep = true;
    }
    if constexpr (kGradient) {
#pragma unroll
      for (int i = 0; i < K; ++i) {
        Line& line = lines[(1 + i) * kColumns];
        float2 value = make_float2(line.taken.x, 0.0f);
        if constexpr (kSets == 2) value.y = fmaf(pass.next_share(), value.x, chosen[i * kColumns].x);
        line.exponents = value;
      }
      __syncthreads();
      fold_to(false, blockIdx.x, static_cast<int>(threadIdx.x));
      __syncthreads();
    }
  }
  pass.finish();
}

// The gradient of a source pixel: of the block that has its row of nodes, and of the strip above, which ends with that
// row; the same of the block to its left, where to the left of the first one is the last one, which has the leading
// columns. Of one class it is 0, unless that is a binary one.
constexpr int kGathered = 128;  // columns of a block, whose threads go over the classes

template <bool kBinary, bool kDecided>
__global__ void __launch_bounds__(kGathered, 10) gather_kernel(
    const Bcl call, const Scratch scratch, float* gradient, const unsigned segments) {
  const CellTile& tile = scratch.tile;
  const unsigned unit = blockIdx.x, height = static_cast<unsigned>(call.logits.height);
  const unsigned image = unit / height, row = unit % height, x = blockIdx.y * kGathered + threadIdx.x;
  const int64_t classes = call.logits.channels, nodes = tile.nodes, block = classes * nodes;
  if (x >= call.logits.width) return;
  const unsigned segment = x / static_cast<unsigned>(tile.cells), node = x % static_cast<unsigned>(tile.cells);
  const bool starts_strip = row > 0 && row % static_cast<unsigned>(tile.rows) == 0;
  const int64_t at = (static_cast<int64_t>(unit) * segments + segment) * block + node;
  const int64_t above = static_cast<int64_t>(image) * tile.strips + row / static_cast<unsigned>(tile.rows) - 1;
  const int64_t at_lower = starts_strip ? (above * segments + segment) * block + node : 0;
  const Divisors& divisors = scratch.factors->divisors;
  const float scale = divisors.scale, of_chosen = divisors.boundary_factor;
  const bool counts = !kDecided || call.options.ce_weight != 0;
  const bool is_shared = node == 0 && (segment > 0 || tile.leading > 0);
  const unsigned before_it = (segment > 0 ? segment : segments) - 1;  // the block to the left
  const int64_t before = (static_cast<int64_t>(before_it) - segment) * block + tile.cells;  // its last node
  const int64_t plane = call.logits.height * call.logits.width;
  float* to = gradient + (image * classes * height + row) * call.logits.width + x;
  const float *upper = scratch.parts.upper + at, *lower = scratch.parts.lower + at_lower;
  const float *chosen_upper = scratch.chosen.upper + at, *chosen_lower = scratch.chosen.lower + at_lower;
  const auto add = [&](auto strip) {
    constexpr bool of_strip = decltype(strip)::value;
    for (int c = 0; c < static_cast<int>(classes); ++c) {
      const auto sum_of = [&](const float* upper, const float* lower) {
        float sum = upper[0], left = is_shared ? upper[before] : 0.0f;
        if (of_strip) sum += lower[0], left += is_shared ? lower[before] : 0.0f;
        return sum + left;
      };
      float sum = counts ? sum_of(upper, lower) : 0.0f;
      if constexpr (kDecided) sum = fmaf(of_chosen, sum_of(chosen_upper, chosen_lower), sum);
      *to = !kBinary && classes == 1 ? 0.0f : scale * sum;
      upper += nodes, to += plane;
      if (of_strip) lower += nodes;
      if (kDecided) chosen_upper += nodes;
      if (kDecided && of_strip) chosen_lower += nodes;
    }
  };
  if (starts_strip) return add(std::true_type());
  add(std::false_type());
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
      const auto kernel = gradient ? columns_kernel<Visit, K, kExact, true> : columns_kernel<Visit, K, false, false>;
      const int bytes = gradient ? Columns<K, kSetsOf<Visit>>::bytes() : Columns<K, 1>::bytes();
      return launch_with_shared(kernel, cell_grid(call), kColumns, bytes, stream, call, scratch);
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
  BCM_LAUNCH(
      kernel, gather_grid(call), kGathered, 0, stream, call, scratch, gradient, static_cast<unsigned>(segments_of(call)));
  return cudaGetLastError();
}

}  // namespace bcmfnet
