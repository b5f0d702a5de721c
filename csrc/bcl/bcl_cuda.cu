// The loss on a GPU, as a sequence of kernels without a wait:
//
//   labels      the three labels of each pixel, in one word
//   score       the cross-entropy and the score of each pixel; with upsampling also the gradient of the cross-entropy,
//               up to its factor, and where the score decides (rooms_cuda.h) that of the boundary term, so that
//               neither candidates nor cells are left to do
//   candidates  non-maximum suppression, to one bit for each pixel; counts of scores by their high byte
//   low_bytes   counts of the scores that share a sought high byte, by their low byte
//   resolve     thresholds, counts and factors
//   select      at full resolution: mask and boundary term of the selected pixels
//   cells       with upsampling: boundary term of the selected pixels, and their gradient
//   gather      with upsampling: the cells' gradients to the low-resolution logits
//   finish      the loss
//
// A call with more terms than cross-entropy and boundary term has kernels of its own for the pixels:
//
//   score       the losses and the score of each pixel, and the sums of overlap; no gradient
//   overlap     the sums of all blocks, and the slopes that follow
//   cells       with upsampling: the gradient of all terms
//
// A block adds what its threads found in a fixed order and writes it where no other does, so that every run gives the
// same bits. Atomics count integers alone.
#include "bcl/bcl_cuda.h"

#include <climits>

#include "bcl/terms_cuda.h"
#include "common/arena.h"

namespace bcmfnet {
namespace {

void lay_out_terms(const Bcl& call, bool saves, Arena& arena, Scratch& scratch) {
  const int64_t pixels = call.logits.batch * call.target.height * call.target.width, classes = classes_of(call);
  scratch.labelled_terms = arena.take<TermSums>(scratch.labelled_blocks);
  scratch.scored_terms = arena.take<TermSums>(scratch.scored_blocks);
  const bool maps = is_upsampled(call) && is_wide(call) && saves;
  if (has_overlap(call.options)) {
    scratch.overlap = arena.take<float>(3 * scratch.scored_blocks * classes);
    scratch.sums = arena.take<float>(3 * overlap_groups(call) * classes);
    scratch.slopes = arena.take<float>(2 * overlap_groups(call) * classes);
    if (maps) scratch.inner = arena.take<float>(pixels);
  }
  if (maps && distills(call)) {
    scratch.student_lse = arena.take<float>(pixels);
    scratch.teacher_best = arena.take<float>(pixels), scratch.teacher_lse = arena.take<float>(pixels);
  }
}

Scratch lay_out(const Bcl& call, bool saves, Arena& arena) {
  Scratch scratch{};
  const bool up = is_upsampled(call), wide = is_wide(call), terms = has_terms(call);
  const int64_t rows = call.logits.batch * call.target.height, pixels = rows * call.target.width;
  scratch.groups = call.options.per_image ? call.logits.batch : 1;
  scratch.labelled_blocks = count_of(tile_grid(call));
  scratch.scored_blocks = count_of(up && !wide ? cell_grid(call) : pixel_grid(call));
  scratch.boundary_blocks = count_of(up && !terms ? cell_grid(call) : tile_grid(call));
  if (up && wide && call.logits.dtype != DType::kFloat32)
    scratch.logits = arena.take<float>(units_of(call) * call.logits.channels * call.logits.width);
  scratch.tile = cell_tile_of(call);
  scratch.score_pitch = round_up(call.target.width, kPacked);
  scratch.words = ceil_div(call.target.width, 32);
  if (selects(call) || !wide) scratch.score = arena.take<uint16_t>(rows * scratch.score_pitch);
  if (wide) scratch.labels = arena.take<uint64_t>(rows * scratch.score_pitch);
  if (selects(call)) {
    if (!decides(call)) scratch.candidates = arena.take<uint32_t>(rows * scratch.words);
    scratch.histogram = arena.take<Histogram>(scratch.groups);
    scratch.boundary = arena.take<double>(scratch.boundary_blocks);
    if (!up || terms) scratch.term = arena.take<float>(pixels);
  }
  if ((up || terms) && wide) scratch.best = arena.take<float>(pixels), scratch.lse = arena.take<float>(pixels);
  if (terms) lay_out_terms(call, saves, arena, scratch);
  if (up && saves) {
    const int64_t nodes = segments_of(call) * call.logits.channels * scratch.tile.nodes;
    const auto take = [&](Parts& parts) {
      parts.upper = arena.take<float>(units_of(call) * nodes);
      parts.lower = arena.take<float>(strips_of(call) * nodes);
    };
    take(scratch.parts);
    if (decides(call)) take(scratch.chosen);
  }
  scratch.labelled = arena.take<Partial>(scratch.labelled_blocks);
  scratch.scored = arena.take<Partial>(scratch.scored_blocks);
  scratch.factors = reinterpret_cast<Factors*>(arena.take<char>(sizeof(Factors) + 4 * scratch.groups));
  return scratch;
}

// The rows and columns that flips read, [kTileRows] and [kTileColumns], of a whole block; and whether a call needs them.
struct Flips {
  bool rows, columns;
};
__device__ Flips flips_of(const Bcl& call, const Tile& tile, int* other_rows, int* other_columns) {
  const BclOptions& options = call.options;
  const Target target{call, tile.image};
  if (threadIdx.x < kTileRows) other_rows[threadIdx.x] = target.flip(0, tile.top + static_cast<int>(threadIdx.x));
  const int column = tile.left + static_cast<int>(threadIdx.x);
  other_columns[threadIdx.x] = column < call.target.width ? target.flip(1, column) : 0;
  __syncthreads();
  return {selects(call) && (options.score[1] != 0 || options.terms[1] != 0),
          selects(call) && (options.score[2] != 0 || options.terms[2] != 0)};
}

// The three labels of each pixel, in one word, of labels that are bytes or longer integers. What takes divisions is done
// once for a block: the rows and columns that flips read. With kWeighs pixels have weights. With kPacks the lane's labels
// of a row are loaded at once.
template <bool kWeighs, bool kPacks, typename Label>
__global__ void __launch_bounds__(kThreads, kWeighs ? 2 : sizeof(Label) > 2 ? 3 : 4) labels_kernel(
    const Bcl call, const Scratch scratch) {
  using Value = std::conditional_t<(sizeof(Label) < 4), int, int64_t>;
  __shared__ int other_rows[kTileRows];
  __shared__ __align__(16) int other_columns[kTileColumns];
  const Tile tile(call);
  const View& view = call.target;
  const TargetOf<kWeighs> target{call, tile.image};
  const BclOptions& options = call.options;
  const auto [needs_rows, needs_columns] = flips_of(call, tile, other_rows, other_columns);
  // A short label equals no ignore_index that an int does not hold.
  const bool ignores = static_cast<Value>(options.ignore_index) == options.ignore_index;
  const auto ignore = static_cast<Value>(ignores ? options.ignore_index : INT_MIN);
  const auto classes = static_cast<std::make_unsigned_t<Value>>(classes_of(call));
  const Label* const labels = static_cast<const Label*>(view.data) + offset_of(view, tile.image, 0, 0);
  const auto weight_of = [&](int y, int x) { return kWeighs ? target.weight(y, x) : 1.0f; };
  const auto read_one = [&](int y, int x) -> Value {
    if (kWeighs && weight_of(y, x) == 0) return ignore;
    return labels[y * view.row_stride + x * view.column_stride];
  };
  const auto read = [&](int y, Value (&values)[kPacked]) {
    if constexpr (kPacks) {
      const Label* const from = labels + y * view.row_stride + tile.x;
      if constexpr (sizeof(Label) == 1) {
        const auto words = Pack<uint32_t, kPacked / 4>::load(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
        for (int i = 0; i < kPacked; ++i) values[i] = __byte_perm(words.value[i / 4], 0, 0x4440 + i % 4);
      } else {
        const auto loaded = Pack<Label, kPacked>::load(from);
#pragma unroll
        for (int i = 0; i < kPacked; ++i) values[i] = loaded.value[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPacked; ++i) values[i] = i < tile.columns ? read_one(y, tile.x + i) : ignore;
    }
  };
  // A label + 1, or 0 for one that does not count.
  const auto code_of = [&](Value label) -> unsigned {
    const bool known = label != ignore && static_cast<std::make_unsigned_t<Value>>(label) < classes;
    return known ? static_cast<unsigned>(label) + 1 : 0;
  };
  int others[kPacked];
#pragma unroll
  for (int i = 0; i < kPacked; ++i) others[i] = other_columns[tile.x - tile.left + i];
  const bool weighs_classes = call.class_weight != nullptr || options.binary;
  float weight = 0, labelled = 0, distilled = 0;
  int valid = 0, known = 0;
  for (int y = tile.begin; tile.columns > 0 && y < tile.end; ++y) {
    Value own[kPacked], flipped[kPacked];
    unsigned codes[kPacked], rows[kPacked] = {}, columns[kPacked] = {};
    read(y, own);
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
      codes[i] = code_of(own[i]);
      valid += own[i] != ignore, known += codes[i] != 0;
      if constexpr (kWeighs) {
        const float u = i < tile.columns ? weight_of(y, tile.x + i) : 0.0f;
        labelled += own[i] != ignore ? u : 0.0f, distilled += own[i] != ignore || options.everywhere ? u : 0.0f;
        if (codes[i] != 0) weight += u * weight_of_class(call, static_cast<int>(codes[i]) - 1);
      }
    }
    if (!kWeighs && weighs_classes) {
#pragma unroll
      for (int i = 0; i < kPacked; ++i)
        weight += codes[i] != 0 ? weight_of_class(call, static_cast<int>(codes[i]) - 1) : 0.0f;
    }
    if (needs_rows) {
      read(other_rows[y - tile.top], flipped);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) rows[i] = codes[i] != 0 ? code_of(flipped[i]) : 0;
    }
    if (needs_columns) {
      const Label* const row = labels + y * view.row_stride;
#pragma unroll
      for (int i = 0; i < kPacked; ++i) flipped[i] = kPacks ? row[others[i]] : read_one(y, others[i]);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) columns[i] = codes[i] != 0 ? code_of(flipped[i]) : 0;
    }
    const int64_t at = tile.row(call, y) * scratch.score_pitch + tile.x;
    Scores narrow{};
    if (is_wide(call)) {
      Pack<uint64_t, kPacked> wide;
#pragma unroll
      for (int i = 0; i < kPacked; ++i) wide.value[i] = Wide::packed(codes[i], rows[i], columns[i]);
      wide.store_to(scratch.labels + at);
    } else {
#pragma unroll
      for (int i = 0; i < kPacked; ++i) narrow.value[i] = Narrow::packed(codes[i], rows[i], columns[i]);
    }
    if (scratch.score) narrow.store_to(scratch.score + at);
  }
  if (!kWeighs && !weighs_classes) weight = static_cast<float>(known);
  write_labelled(weight, valid, valid != known ? kWrong : 0, scratch.labelled + block_number());
  if constexpr (kWeighs) write_terms({labelled, distilled, 0, 0, 0}, scratch.labelled_terms + block_number());
}

// Four labels that are bytes, as label + 1 or 0 for one that does not count; of up to kMostClasses, one of which may be
// ignored (kIgnoresClass).
template <bool kIgnoresClass>
struct LabelBytes {
  static constexpr uint32_t kEach = 0x01010101, kHigh = 0x80 * kEach, kLow = ~kHigh;

  const uint32_t ignored, beyond;  // in each byte: ignore_index, and what takes the number of classes to the highest bit
  const bool ignores;

  __device__ explicit LabelBytes(const Bcl& call)
      : ignored(static_cast<uint8_t>(call.options.ignore_index) * kEach),
        beyond((0x80 - static_cast<uint32_t>(call.logits.channels)) * kEach),
        ignores(call.options.ignore_index == static_cast<uint8_t>(call.options.ignore_index)) {}
  // The highest bit of each that is not ignored.
  __device__ uint32_t valid(uint32_t labels) const {
    const uint32_t differs = labels ^ ignored;
    return ignores ? (((differs & kLow) + kLow) | differs) & kHigh : kHigh;
  }
  // All bits of each that counts.
  __device__ uint32_t known(uint32_t labels) const {
    uint32_t high = ~(((labels & kLow) + beyond) | labels) & kHigh;
    if (kIgnoresClass) high &= valid(labels);
    return (high - (high >> 7)) | high;
  }
  __device__ static uint32_t codes(uint32_t labels, uint32_t known) { return ((labels & kLow) + kEach) & known; }
};

// The same of labels that are bytes, four at a time.
template <bool kIgnoresClass>
__global__ void __launch_bounds__(kThreads, 4) label_bytes_kernel(const Bcl call, const Scratch scratch) {
  constexpr int kWords = kPacked / 4;
  using Words = Pack<uint32_t, kWords>;
  using Bytes = LabelBytes<kIgnoresClass>;
  __shared__ int other_rows[kTileRows];
  __shared__ __align__(16) int other_columns[kTileColumns];
  const Tile tile(call);
  const auto [needs_rows, needs_columns] = flips_of(call, tile, other_rows, other_columns);
  const View& view = call.target;
  const uint8_t* const labels = static_cast<const uint8_t*>(view.data) + offset_of(view, tile.image, 0, 0);
  const Bytes bytes(call);
  int others[kPacked];
#pragma unroll
  for (int i = 0; i < kPacked; ++i) others[i] = other_columns[tile.x - tile.left + i];
  float weight = 0;
  int valid = 0, known = 0;
  for (int y = tile.begin; tile.columns > 0 && y < tile.end; ++y) {
    const uint8_t* const row = labels + y * view.row_stride;
    const auto read = [&](const uint8_t* from) { return Words::load(reinterpret_cast<const uint32_t*>(from + tile.x)); };
    const Words own = read(row), of_rows = needs_rows ? read(labels + other_rows[y - tile.top] * view.row_stride) : Words{};
    Pack<uint32_t, kPacked / 2> narrow;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t mask = bytes.known(own.value[i]), codes = Bytes::codes(own.value[i], mask);
      valid += __popc(bytes.valid(own.value[i])), known += __popc(mask & Bytes::kHigh);
      const auto flipped = [&](uint32_t other) { return Bytes::codes(other, bytes.known(other)) & mask; };
      const uint32_t rows = needs_rows ? flipped(of_rows.value[i]) : 0;
      uint32_t columns = 0;
      if (needs_columns) {
        const auto read_one = [&](int at) -> uint32_t { return row[others[4 * i + at]]; };
        columns = flipped(read_one(0) | read_one(1) << 8 | read_one(2) << 16 | read_one(3) << 24);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto pair = [&](uint32_t word) { return __byte_perm(word, 0, half ? 0x4342 : 0x4140); };
        narrow.value[2 * i + half] = pair(codes) + pair(rows) * 32 + pair(columns) * 1024;
      }
      if (call.class_weight) {
#pragma unroll
        for (int shift = 0; shift < 32; shift += 8) {
          const int code = codes >> shift & 0xff;
          weight += code != 0 ? class_weight_of(call, code - 1) : 0.0f;
        }
      }
    }
    narrow.store_to(reinterpret_cast<uint32_t*>(scratch.score + tile.row(call, y) * scratch.score_pitch + tile.x));
  }
  if (!call.class_weight) weight = static_cast<float>(known);
  write_labelled(weight, valid, valid != known ? kWrong : 0, scratch.labelled + block_number());
}

// The means of other terms, and the factors that they add.
__device__ void resolve_terms(
    const Bcl& call, const Scratch& scratch, double ce, double weight, int64_t valid, int64_t selected, unsigned flags) {
  __shared__ double doubles[kThreads / 32];
  TermSums sum{};
  const auto add = [&](const TermSums* parts, int64_t blocks) {
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
      sum.labelled += parts[i].labelled, sum.distilled += parts[i].distilled, sum.spread += parts[i].spread;
      sum.focal += parts[i].focal, sum.distillation += parts[i].distillation;
    }
  };
  const bool weighs_pixels = call.pixel_weight.data != nullptr;
  if (weighs_pixels) add(scratch.labelled_terms, scratch.labelled_blocks);
  add(scratch.scored_terms, scratch.scored_blocks);
  double labelled = sum_of_block(sum.labelled, doubles), distilled = sum_of_block(sum.distilled, doubles);
  const double spread = sum_of_block(sum.spread, doubles), focal = sum_of_block(sum.focal, doubles);
  const double distillation = sum_of_block(sum.distillation, doubles);
  if (threadIdx.x != 0) return;
  const BclOptions& options = call.options;
  if (!weighs_pixels) {
    const int64_t pixels = call.logits.batch * call.target.height * call.target.width;
    labelled = static_cast<double>(valid), distilled = static_cast<double>(options.everywhere ? pixels : valid);
  }
  Factors& factors = *scratch.factors;
  factors.divisors = divisors_of(
      options, !(flags & kWrong), options.binary ? labelled : weight, valid, selected, distilled);
  factors.divisors.scale = 1;
  const double* const inverse = factors.divisors.inverse;
  const bool smooths = options.smoothing != 0, weighs = weight != 0;  // NaN does
  if (smooths) {
    const double spreads = weighs ? spread * options.smoothing / static_cast<double>(classes_of(call)) : 0;
    ce = (1 - double(options.smoothing)) * ce + spreads;
  }
  for (double& mean : factors.means) mean = 0;
  factors.means[kCe] = ce * inverse[0], factors.means[kFocal] = focal * inverse[0];
  factors.means[kDistillation] = distillation * options.temperature * options.temperature * inverse[2];
  for (int i = 0; i < 3; ++i) factors.scales[i] = static_cast<float>(inverse[i]);
  // Where no label has a weight nothing is smoothed either, and all else that this scale is for has the weight 0.
  if (smooths && !weighs) factors.scales[0] = 0;
}

// One block: thresholds by its warps, sums of all blocks of `score`, and the factors that follow.
template <bool kTerms>
__global__ void __launch_bounds__(kThreads, 1) resolve_kernel(
    const Bcl call, const Scratch scratch, const BclOutputs outputs) {
  __shared__ double doubles[kThreads / 32];
  __shared__ int64_t integers[kThreads / 32];
  Factors& factors = *scratch.factors;
  const BclOptions& options = call.options;
  int64_t selected = 0;
  for (int64_t group = threadIdx.x / 32; group < scratch.groups; group += kThreads / 32) {
    int score = options.selection.tau;
    if (selects(call)) {
      const Threshold threshold(scratch.histogram[group], options.selection);
      score = threshold.score;
      selected += threadIdx.x % 32 == 0 ? threshold.selected : 0;
    }
    if (threadIdx.x % 32 == 0) factors.threshold[group] = outputs.threshold[group] = score;
  }
  selected = sum_of_block(selected, integers);
  Partial sum{};
  const auto add = [&](const Partial* parts, int64_t blocks) {
    for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
      sum.weight += parts[i].weight, sum.ce += parts[i].ce, sum.valid += parts[i].valid;
      sum.flags |= parts[i].flags;
    }
  };
  add(scratch.labelled, scratch.labelled_blocks);
  add(scratch.scored, scratch.scored_blocks);
  const double weight = sum_of_block(sum.weight, doubles), ce = sum_of_block(sum.ce, doubles);
  const int64_t valid = sum_of_block(sum.valid, integers);
  unsigned flags = flags_of_block(sum.flags);
  if constexpr (kTerms) {
    if (!isfinite(weight)) flags |= kWrong;  // known by the first thread
    resolve_terms(call, scratch, ce, weight, valid, selected, flags);
  }
  if (threadIdx.x != 0) return;
  if constexpr (!kTerms) {
    if (!isfinite(weight)) flags |= kWrong;
    factors.divisors = divisors_of(options, !(flags & kWrong), weight, valid, selected);
    factors.means[kCe] = ce * factors.divisors.inverse[0];
  }
  factors.selected = selected, factors.flags = flags;
  for (int i = 0; i < kValues; ++i) outputs.values[i] = 0;
  outputs.values[kCe] = static_cast<float>(factors.means[kCe]);
  outputs.counts[0] = selected, outputs.counts[1] = valid;
  if constexpr (kTerms) {
    outputs.values[kFocal] = static_cast<float>(factors.means[kFocal]);
    outputs.values[kDistillation] = static_cast<float>(factors.means[kDistillation]);
    for (int i = 0; outputs.scales && i < 3; ++i) outputs.scales[i] = factors.scales[i];
  } else {
    for (int i = 0; outputs.scales && i < 2; ++i)
      outputs.scales[i] = static_cast<float>(factors.divisors.inverse[i]);
    if (outputs.scales) outputs.scales[2] = 0;
  }
}

// One block: the loss.
template <bool kTerms>
__global__ void __launch_bounds__(kThreads) finish_kernel(
    const Bcl call, const Scratch scratch, const BclOutputs outputs) {
  __shared__ double doubles[kThreads / 32];
  const Factors& factors = *scratch.factors;
  double sum = 0;
  for (int64_t i = threadIdx.x; selects(call) && i < scratch.boundary_blocks; i += kThreads) sum += scratch.boundary[i];
  sum = sum_of_block(sum, doubles);
  if (threadIdx.x != 0) return;
  const bool nan = (factors.flags & kNan) && selects(call);
  const double boundary = nan ? __builtin_nan("") : sum * factors.divisors.inverse[1];
  double loss;
  if constexpr (kTerms) {
    double means[kValues];
    for (int i = 0; i < kValues; ++i) means[i] = i == kBoundary ? boundary : factors.means[i];
    loss = loss_of(call.options, means);
  } else {
    loss = loss_of(call.options, factors.means[kCe], boundary);
  }
  outputs.values[kBoundary] = static_cast<float>(boundary);
  *outputs.loss = static_cast<float>(factors.flags & kWrong ? __builtin_nan("") : loss);
}

// The call with its low-resolution logits as float32.
Bcl widened(const Bcl& call, const Scratch& scratch) {
  Bcl wide = call;
  View& logits = wide.logits;
  logits.data = scratch.logits, logits.dtype = DType::kFloat32;
  logits.column_stride = 1, logits.row_stride = logits.width;
  logits.channel_stride = logits.height * logits.width;
  logits.batch_stride = logits.channels * logits.channel_stride;
  return wide;
}

int resolve(const Bcl& call, const Scratch& scratch, const BclOutputs& outputs, bool terms, void* stream) {
  if (terms) {
    BCM_LAUNCH(resolve_kernel<true>, 1, kThreads, 0, stream, call, scratch, outputs);
    if (has_overlap(call.options)) BCM_TRY(launch_overlap(call, scratch, outputs, stream));
  } else {
    BCM_LAUNCH(resolve_kernel<false>, 1, kThreads, 0, stream, call, scratch, outputs);
  }
  return cudaGetLastError();
}

template <typename Label>
int label_as(const Bcl& call, const Scratch& scratch, void* stream) {
  const View& view = call.target;
  const bool packs = view.column_stride == 1 && view.width % kPacked == 0 && view.row_stride % kPacked == 0 &&
                     view.batch_stride % kPacked == 0 && reinterpret_cast<uintptr_t>(view.data) % kPackBytes == 0;
  const bool bytes = sizeof(Label) == 1 && packs && !is_wide(call) && !call.options.binary;
  const bool ignores_class = call.options.ignore_index >= 0 && call.options.ignore_index < call.logits.channels;
  const auto kernel = call.pixel_weight.data ? labels_kernel<true, false, Label>
                      : bytes                ? ignores_class ? label_bytes_kernel<true> : label_bytes_kernel<false>
                      : packs                ? labels_kernel<false, true, Label>
                                             : labels_kernel<false, false, Label>;
  BCM_LAUNCH(kernel, tile_grid(call), kThreads, 0, stream, call, scratch);
  return cudaGetLastError();
}

int label(const Bcl& call, const Scratch& scratch, void* stream) {
  switch (call.target.dtype) {
    case DType::kUInt8: return label_as<uint8_t>(call, scratch, stream);
    case DType::kInt16: return label_as<int16_t>(call, scratch, stream);
    case DType::kInt32: return label_as<int32_t>(call, scratch, stream);
    default: return label_as<int64_t>(call, scratch, stream);
  }
}

int forward_full(const Bcl& call, Scratch scratch, const BclOutputs& outputs, bool terms, void* stream) {
  if (outputs.lse) scratch.lse = outputs.lse;
  BCM_TRY(label(call, scratch, stream));
  BCM_TRY((terms ? launch_term_scores : launch_full_scores)(call, scratch, stream));
  if (selects(call)) BCM_TRY(launch_candidates(call, scratch, stream));
  BCM_TRY(resolve(call, scratch, outputs, terms, stream));
  if (selects(call)) {
    BCM_TRY(launch_selection(call, scratch, outputs.mask, stream));
  } else if (outputs.mask) {
    const int64_t pixels = call.logits.batch * call.target.height * call.target.width;
    BCM_TRY(cudaMemsetAsync(outputs.mask, 0, pixels, static_cast<cudaStream_t>(stream)));
  }
  return cudaGetLastError();
}

int forward_upsampled(
    const Bcl& given, const Scratch& scratch, const BclOutputs& outputs, bool terms, void* stream) {
  if (scratch.logits) BCM_TRY(widen(given, scratch, stream));
  const Bcl call = scratch.logits ? widened(given, scratch) : given;
  const bool gradient = outputs.gradient != nullptr;
  BCM_TRY(label(call, scratch, stream));
  if (terms) {
    BCM_TRY(launch_cell_scores(call, scratch, stream));
  } else {
    BCM_TRY(launch_upsampled_scores(call, scratch, gradient, stream));
  }
  if (selects(call) && !decides(call)) BCM_TRY(launch_candidates(call, scratch, stream));
  BCM_TRY(resolve(call, scratch, outputs, terms, stream));
  if (!terms) {
    if (!decides(call)) BCM_TRY(launch_selected(call, scratch, gradient, stream));
  } else {
    if (selects(call)) BCM_TRY(launch_selection(call, scratch, outputs.mask, stream));
    if (gradient) BCM_TRY(launch_cell_gradient(call, scratch, stream));
  }
  if (gradient) BCM_TRY(gather_gradient(call, scratch, outputs.gradient, stream));
  return cudaGetLastError();
}

}  // namespace
}  // namespace bcmfnet

extern "C" int64_t bcl_scratch_bytes_cuda(const bcmfnet::Bcl* call, bool saves) {
  bcmfnet::Arena arena{nullptr};
  bcmfnet::lay_out(*call, saves, arena);
  return arena.bytes;
}

extern "C" int bcl_forward_cuda(
    const bcmfnet::Bcl* call, const bcmfnet::BclOutputs* outputs, void* memory, bool saves, void* stream) {
  using namespace bcmfnet;
  Arena arena{static_cast<char*>(memory)};
  Bcl shown = *call;
  const bool terms = has_terms(shown);
  Scratch scratch = lay_out(shown, saves, arena);
  if (outputs->sums) scratch.sums = outputs->sums;
  if (outputs->slopes) scratch.slopes = outputs->slopes;
  if (shown.logits.batch == 0) {
    shown.options.boundary_weight = 0;  // no image, no block: nothing has been counted
    BCM_TRY(resolve(shown, scratch, *outputs, terms, stream));
  } else if (is_upsampled(shown)) {
    BCM_TRY(forward_upsampled(shown, scratch, *outputs, terms, stream));
  } else {
    BCM_TRY(forward_full(shown, scratch, *outputs, terms, stream));
  }
  if (terms) {
    BCM_LAUNCH(finish_kernel<true>, 1, kThreads, 0, stream, shown, scratch, *outputs);
  } else {
    BCM_LAUNCH(finish_kernel<false>, 1, kThreads, 0, stream, shown, scratch, *outputs);
  }
  return cudaGetLastError();
}
