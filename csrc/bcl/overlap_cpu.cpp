// The room of overlap: pixels are not looked at any more, only the sums of classes.
#include "bcl/rooms_cpu.h"

namespace bcmfnet::BCM_ISA {
namespace {

// Sums I, P and Y of a class in a group of units, which are added in their order.
struct ClassSums {
  double hits = 0, predicted = 0, labelled = 0;

  ClassSums(const Run& run, int64_t group, int64_t c) {
    const int64_t classes = classes_of(run.call), units = run.units / larger_of(overlap_groups(run.call), int64_t{1});
    for (int64_t unit = group * units; unit < (group + 1) * units; ++unit) {
      const double* from = run.overlap_sums + unit * 3 * classes + c;
      hits += from[0], predicted += from[classes], labelled += from[2 * classes];
    }
  }
};

}  // namespace

void evaluate_overlap(const Run& run, double* values, float* sums, float* slopes) {
  const Overlap& overlap = run.call.options.overlap;
  const int64_t classes = classes_of(run.call), groups = overlap_groups(run.call);
  double valid_groups = 0;
  for (int64_t group = 0; group < groups; ++group) {
    float* const to = sums + group * 3 * classes;
    bool valid = false;
    for (int64_t c = 0; c < classes; ++c) {
      const ClassSums of_class(run, group, c);
      to[c] = static_cast<float>(of_class.hits), to[classes + c] = static_cast<float>(of_class.predicted);
      to[2 * classes + c] = static_cast<float>(of_class.labelled), valid |= of_class.labelled > 0;
    }
    valid_groups += valid;
  }
  for (int64_t group = 0; group < groups; ++group) {
    const float* from = sums + group * 3 * classes;
    double divisor = 0;
    bool valid = false;
    for (int64_t c = 0; c < classes; ++c) {
      const double labelled = from[2 * classes + c];
      divisor += class_share_of(run.call, c, labelled).divides, valid |= labelled > 0;
    }
    for (int64_t c = 0; c < classes; ++c) {
      const double hits = from[c], predicted = from[classes + c], labelled = from[2 * classes + c];
      const double added = valid ? class_share_of(run.call, c, labelled).added / larger_of(valid_groups, 1.0) : 0;
      const double share = divisor > 0 ? added / divisor : added;
      double of_predicted = 0, of_hits = 0;
      for (int i = 0; i < 3; ++i) {
        if (overlap.weight[i] == 0) continue;
        const ClassLoss loss = class_loss_of(overlap, i, hits, predicted, labelled);
        values[i] += share * loss.loss;
        of_predicted += overlap.weight[i] * share * loss.of_predicted, of_hits += overlap.weight[i] * share * loss.of_hits;
      }
      if (!slopes) continue;
      float* const to = slopes + group * 2 * classes + c;
      to[0] = static_cast<float>(of_predicted), to[classes] = static_cast<float>(of_hits);
    }
  }
}

}  // namespace bcmfnet::BCM_ISA
