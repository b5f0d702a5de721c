// The loss on a GPU, as a sequence of kernels without a wait:
//
//   labels      the three labels of each pixel, in one word
//   score       the cross-entropy and the score of each pixel; with upsampling also the gradient of the cross-entropy,
//               up to its factor
//   candidates  non-maximum suppression, to one bit for each pixel; counts of scores by their high byte
//   low_bytes   counts of the scores that share a sought high byte, by their low byte
//   resolve     thresholds, counts and factors
//   select      at full resolution: mask and boundary term of the selected pixels
//   cells       with upsampling: boundary term of the selected pixels, and their gradient
//   gather      with upsampling: the cells' gradients to the low-resolution logits
//   finish      the loss
//
// A block adds what its threads found in a fixed order and writes it where no other does, so that every run gives the
// same bits. Atomics count integers alone.
#include "bcl/bcl_cuda.h"

#include "bcl/pixels_cuda.h"
#include "common/arena.h"

namespace bcmfnet {
namespace {

Scratch lay_out(const Bcl& call, bool saves, Arena& arena) {
  Scratch scratch{};
  const bool up = is_upsampled(call), wide = is_wide(call);
  const int64_t rows = call.logits.batch * call.target.height, pixels = rows * call.target.width;
  scratch.groups = call.options.per_image ? call.logits.batch : 1;
  scratch.labelled_blocks = count_of(pixel_grid(call));
  scratch.scored_blocks = count_of(up && !wide ? cell_grid(call) : pixel_grid(call));
  scratch.boundary_blocks = count_of(up ? cell_grid(call) : pixel_grid(call));
  if (up && call.logits.dtype != DType::kFloat32)
    scratch.logits = arena.take<float>(units_of(call) * call.logits.channels * call.logits.width);
  scratch.score_pitch = round_up(call.target.width, 2);
  scratch.words = ceil_div(call.target.width, 32);
  if (selects(call) || !wide) scratch.score = arena.take<uint16_t>(rows * scratch.score_pitch);
  if (wide) scratch.labels = arena.take<uint64_t>(rows * scratch.score_pitch);
  if (selects(call)) {
    scratch.candidates = arena.take<uint32_t>(rows * scratch.words);
    scratch.histogram = arena.take<Histogram>(scratch.groups);
    scratch.boundary = arena.take<double>(scratch.boundary_blocks);
    if (!up) scratch.term = arena.take<float>(pixels);
  }
  if (up && wide) scratch.best = arena.take<float>(pixels), scratch.lse = arena.take<float>(pixels);
  if (up && saves) {
    const int64_t nodes = units_of(call) * segments_of(call) * call.logits.channels * kNodes;
    scratch.upper = arena.take<float>(nodes), scratch.lower = arena.take<float>(nodes);
  }
  scratch.labelled = arena.take<Partial>(scratch.labelled_blocks);
  scratch.scored = arena.take<Partial>(scratch.scored_blocks);
  scratch.factors = reinterpret_cast<Factors*>(arena.take<char>(sizeof(Factors) + 4 * scratch.groups));
  return scratch;
}

// The three labels of each pixel, in one word.
__global__ void __launch_bounds__(kThreads, 4) labels_kernel(const Bcl call, const Scratch scratch) {
  const Patch patch(call);
  const Target target{call, patch.image};
  const BclOptions& options = call.options;
  const bool needs_rows = selects(call) && (options.score[1] != 0 || options.terms[1] != 0);
  const bool needs_columns = selects(call) && (options.score[2] != 0 || options.terms[2] != 0);
  const int other_x = patch.inside ? target.flip(1, patch.x) : 0;
  float weight = 0;
  int valid = 0;
  unsigned flags = 0;
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t label = target.read(y, patch.x);
    const bool counts = label != options.ignore_index;
    Labels labels{target.known(label), -1, -1};
    valid += counts, flags |= counts && labels.own < 0 ? kWrong : 0;
    if (labels.own >= 0) {
      weight += class_weight_of(call, labels.own);
      if (needs_rows) labels.rows = target.known(target.read(target.flip(0, y), patch.x));
      if (needs_columns) labels.columns = target.known(target.read(y, other_x));
    }
    const int64_t at = (patch.image * call.target.height + y) * scratch.score_pitch + patch.x;
    if (is_wide(call)) {
      scratch.labels[at] = Wide::packed(labels);
    } else {
      scratch.score[at] = Narrow::packed(labels);
    }
  }
  write_partial(weight, 0, valid, flags, scratch.labelled + block_number());
}

// One block: thresholds by its warps, sums of all blocks of `score`, and the factors that follow.
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
  if (threadIdx.x != 0) return;
  if (!isfinite(weight)) flags |= kWrong;
  factors.divisors = divisors_of(options, !(flags & kWrong), weight, valid, selected);
  factors.ce = ce * factors.divisors.inverse[0], factors.selected = selected;
  factors.flags = flags;
  for (int i = 0; i < kValues; ++i) outputs.values[i] = 0;
  outputs.values[kCe] = static_cast<float>(factors.ce);
  outputs.counts[0] = selected, outputs.counts[1] = valid;
  for (int i = 0; outputs.scales && i < 2; ++i)
    outputs.scales[i] = static_cast<float>(factors.divisors.inverse[i]);
  if (outputs.scales) outputs.scales[2] = 0;
}

// One block: the loss.
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
  const double loss = loss_of(call.options, factors.ce, boundary);
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

int forward_full(const Bcl& call, Scratch scratch, const BclOutputs& outputs, void* stream) {
  scratch.lse = outputs.lse;
  BCM_LAUNCH(labels_kernel, pixel_grid(call), kThreads, 0, stream, call, scratch);
  BCM_TRY(launch_full_scores(call, scratch, stream));
  if (selects(call)) BCM_TRY(launch_candidates(call, scratch, stream));
  BCM_LAUNCH(resolve_kernel, 1, kThreads, 0, stream, call, scratch, outputs);
  if (selects(call)) {
    BCM_TRY(launch_selection(call, scratch, outputs.mask, stream));
  } else if (outputs.mask) {
    const int64_t pixels = call.logits.batch * call.target.height * call.target.width;
    BCM_TRY(cudaMemsetAsync(outputs.mask, 0, pixels, static_cast<cudaStream_t>(stream)));
  }
  return cudaGetLastError();
}

int forward_upsampled(const Bcl& given, const Scratch& scratch, const BclOutputs& outputs, void* stream) {
  if (scratch.logits) BCM_TRY(widen(given, scratch, stream));
  const Bcl call = scratch.logits ? widened(given, scratch) : given;
  const bool gradient = outputs.gradient != nullptr;
  BCM_LAUNCH(labels_kernel, pixel_grid(call), kThreads, 0, stream, call, scratch);
  BCM_TRY(launch_upsampled_scores(call, scratch, gradient, stream));
  if (selects(call)) BCM_TRY(launch_candidates(call, scratch, stream));
  BCM_LAUNCH(resolve_kernel, 1, kThreads, 0, stream, call, scratch, outputs);
  BCM_TRY(launch_selected(call, scratch, gradient, stream));
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
  const Scratch scratch = lay_out(shown, saves, arena);
  if (shown.logits.batch == 0) {
    shown.options.boundary_weight = 0;  // no image, no block: nothing has been counted
    BCM_LAUNCH(resolve_kernel, 1, kThreads, 0, stream, shown, scratch, *outputs);
  } else if (is_upsampled(shown)) {
    BCM_TRY(forward_upsampled(shown, scratch, *outputs, stream));
  } else {
    BCM_TRY(forward_full(shown, scratch, *outputs, stream));
  }
  BCM_LAUNCH(finish_kernel, 1, kThreads, 0, stream, shown, scratch, *outputs);
  return cudaGetLastError();
}
