// The room of overlap: from the sums of blocks to those of classes, to the losses and their slopes.
#include "bcl/pixels_cuda.h"

namespace bcmfnet {
namespace {

// A block for each sum: adds those of the blocks of its image, or of all.
__global__ void __launch_bounds__(kThreads) sums_kernel(
    const Bcl call, const Scratch scratch, const unsigned across, const unsigned down) {
  __shared__ double doubles[kThreads / 32];
  const int64_t each = 3 * classes_of(call), group = blockIdx.x / each, which = blockIdx.x % each;
  const unsigned own = call.logits.batch == 0 ? 0 : static_cast<unsigned>(across / overlap_groups(call));
  double sum = 0;
  for (unsigned i = threadIdx.x; i < own * down; i += kThreads) {
    const int64_t block = static_cast<int64_t>(i / own) * across + group * own + i % own;
    sum += scratch.overlap[block * each + which];
  }
  sum = sum_of_block(sum, doubles);
  if (threadIdx.x == 0) scratch.sums[blockIdx.x] = static_cast<float>(sum);
}

// One block: the losses, and the derivatives of their weighted sum by P and I of each class.
__global__ void __launch_bounds__(kThreads) slopes_kernel(
    const Bcl call, const Scratch scratch, const BclOutputs outputs) {
  __shared__ double doubles[kThreads / 32], divisor;
  const Overlap& overlap = call.options.overlap;
  const int64_t classes = classes_of(call), groups = overlap_groups(call);
  const auto is_labelled = [&](int64_t group) {
    bool any = false;
    for (int64_t c = threadIdx.x; c < classes; c += kThreads) any |= scratch.sums[(3 * group + 2) * classes + c] > 0;
    return __syncthreads_or(any) != 0;
  };
  int64_t images = 0;
  for (int64_t group = 0; group < groups; ++group) images += is_labelled(group);
  double losses[3] = {};
  for (int64_t group = 0; group < groups; ++group) {
    const float* const sums = scratch.sums + 3 * group * classes;
    const bool labelled = is_labelled(group);
    double total = 0;
    for (int64_t c = threadIdx.x; c < classes; c += kThreads)
      total += class_share_of(call, c, sums[2 * classes + c]).divides;
    total = sum_of_block(total, doubles);
    if (threadIdx.x == 0) divisor = (total > 0 ? total : 1) * static_cast<double>(larger_of<int64_t>(images, 1));
    __syncthreads();
    for (int64_t c = threadIdx.x; c < classes; c += kThreads) {
      const double hits = sums[c], predicted = sums[classes + c], of_class = sums[2 * classes + c];
      const double share = labelled ? class_share_of(call, c, of_class).added / divisor : 0;
      double of_predicted = 0, of_hits = 0;
      for (int i = 0; i < 3 && share != 0; ++i) {
        if (overlap.weight[i] == 0) continue;
        const ClassLoss loss = class_loss_of(overlap, i, hits, predicted, of_class);
        losses[i] += share * loss.loss;
        of_predicted += overlap.weight[i] * share * loss.of_predicted;
        of_hits += overlap.weight[i] * share * loss.of_hits;
      }
      const int64_t at = 2 * group * classes + c;
      const float* const shared = call.shared_slopes;
      scratch.slopes[at] = shared ? shared[at] : static_cast<float>(of_predicted);
      scratch.slopes[at + classes] = shared ? shared[at + classes] : static_cast<float>(of_hits);
    }
    __syncthreads();
  }
  for (int i = 0; i < 3; ++i) {
    const double loss = sum_of_block(losses[i], doubles);
    if (threadIdx.x == 0) scratch.factors->means[kDice + i] = loss, outputs.values[kDice + i] = static_cast<float>(loss);
  }
}

}  // namespace

int launch_overlap(const Bcl& call, const Scratch& scratch, const BclOutputs& outputs, void* stream) {
  const dim3 grid = scored_grid(call);
  const int64_t sums = overlap_groups(call) * 3 * classes_of(call);
  if (sums > 0)
    BCM_LAUNCH(sums_kernel, static_cast<unsigned>(sums), kThreads, 0, stream, call, scratch, grid.x, grid.y);
  BCM_LAUNCH(slopes_kernel, 1, kThreads, 0, stream, call, scratch, outputs);
  return cudaGetLastError();
}

}  // namespace bcmfnet
