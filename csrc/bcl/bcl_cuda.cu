// The loss on a GPU, as a sequence of kernels without a wait:
//
//   labels      the three labels of each pixel, in one word; of upsampled logits its own alone, in a byte
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
  const bool coded = codes_labels(call);
  if (coded) scratch.codes = arena.take<uint8_t>(rows * scratch.score_pitch);
  if (coded && selects(call)) {
    scratch.other_rows = arena.take<int64_t>(call.target.height);
    scratch.other_columns = arena.take<int>(call.target.width);
  }
  if (coded ? selects(call) && !decides(call) : selects(call) || !wide)
    scratch.score = arena.take<uint16_t>(rows * scratch.score_pitch);
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

int forward_full(const Bcl& call, Scratch scratch, const BclOutputs& outputs, bool terms, void* stream) {
  if (outputs.lse) scratch.lse = outputs.lse;
  BCM_TRY(launch_labels(call, scratch, stream));
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
  BCM_TRY(launch_labels(call, scratch, stream));
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
