// The room of logits at full resolution.
#include "bcl/bcl_cuda.h"
#include "bcl/pixels_cuda.h"

namespace bcmfnet {
namespace {

// Logits of a pixel at full resolution.
template <typename T>
struct Full {
  const T* at;
  int64_t stride;

  __device__ Full(const Bcl& call, int64_t image, int y, int x)
      : at(static_cast<const T*>(call.logits.data) + offset_of(call.logits, image, 0, y, x)),
        stride(call.logits.channel_stride) {}
  __device__ float operator()(int64_t c) const { return as_float(at[c * stride]); }
  // K classes from `first` on, -inf beyond the last one.
  template <int K>
  __device__ void read(int first, int classes, float* z) const {
    const T* from = at + first * stride;
#pragma unroll
    for (int i = 0; i < K; ++i, from += stride) z[i] = first + i < classes ? as_float(*from) : -kInfinity;
  }
};

// A thread reads all logits of its pixel before it writes: the gradient may take their place. The softmax of all
// classes is written first, then the few that are labels.
template <typename T, int K>
__global__ void __launch_bounds__(kThreads, K <= 19 ? 2 : 1) gradient_kernel(
    const Bcl call, const BclSaved saved, const View gradient) {
  const Patch patch(call);
  const Target target{call, patch.image};
  const int classes = static_cast<int>(call.logits.channels);
  const float factor = *saved.grad;
  const float of_ce = call.options.ce_weight * saved.scales[0];
  const float of_boundary = call.options.boundary_weight * saved.scales[1];
  for (int y = patch.begin; patch.inside && y < patch.end; ++y) {
    const int64_t at = (patch.image * call.target.height + y) * call.target.width + patch.x;
    T* const to = static_cast<T*>(gradient.data) + offset_of(gradient, patch.image, 0, y, patch.x);
    const Labels labels = target.of_term(y, patch.x);
    Amounts<float> amounts{};
    if (labels.own >= 0) amounts = amounts_of(call, labels, saved.mask[at], of_ce, of_boundary);
    const Full<T> logits(call, patch.image, y, patch.x);
    const bool counts = amounts.total != 0 && classes > 1;
    float z[K], best = -kInfinity;
    logits.template read<K>(0, classes, z);
#pragma unroll
    for (int i = 0; i < K; ++i) best = fmaxf(best, z[i]);
    for (int c = K; c < classes; ++c) best = fmaxf(best, logits(c));
    const float shift = Softmax<K>::shift_of(best), scale = amounts.total * exp2_of(-kLog2E * saved.lse[at]);
    const auto of_label = [&](int label) {
      float g = scale * exp2_of(exponent(logits(label), shift)) - amounts.own * (label == labels.own);
      g -= amounts.rows * (label == labels.rows) + amounts.columns * (label == labels.columns);
      return factor * g;
    };
    const bool has_rows = counts && amounts.rows != 0, has_columns = counts && amounts.columns != 0;
    const float own = counts ? of_label(labels.own) : 0.0f, rows = has_rows ? of_label(labels.rows) : 0.0f;
    const float columns = has_columns ? of_label(labels.columns) : 0.0f;
    for (int first = 0; first < classes; first += K) {
      if (first > 0) logits.template read<K>(first, classes, z);
      T* next = to + first * gradient.channel_stride;
#pragma unroll
      for (int i = 0; i < K; ++i, next += gradient.channel_stride) {
        const float g = factor * (scale * exp2_of(exponent(z[i], shift)));
        if (first + i < classes) store(next, counts ? g : 0.0f);
      }
    }
    if (counts) store(to + labels.own * gradient.channel_stride, own);
    if (has_rows) store(to + labels.rows * gradient.channel_stride, rows);
    if (has_columns) store(to + labels.columns * gradient.channel_stride, columns);
  }
}

}  // namespace

int launch_full_scores(const Bcl& call, const Scratch& scratch, void* stream) {
  return dispatch_float(call.logits.dtype, [&](auto zero) {
    return by_classes(call.logits.channels, [&](auto k) {
      using Logits = Full<decltype(zero)>;
      BCM_LAUNCH(
          (score_pixels_kernel<Logits, decltype(k)::value>), pixel_grid(call), kThreads, 0, stream, call, scratch);
      return static_cast<int>(cudaGetLastError());
    });
  });
}

}  // namespace bcmfnet

extern "C" int bcl_backward_cuda(
    const bcmfnet::Bcl* call, const bcmfnet::BclSaved* saved, const bcmfnet::View* gradient, void* stream) {
  using namespace bcmfnet;
  if (call->logits.batch == 0) return cudaSuccess;
  if (has_terms(*call)) return launch_term_gradient(*call, *saved, *gradient, stream);
  return dispatch_float(call->logits.dtype, [&](auto zero) {
    return by_classes(call->logits.channels, [&](auto k) {
      BCM_LAUNCH(
          (gradient_kernel<decltype(zero), decltype(k)::value>), pixel_grid(*call), kThreads, 0, stream, *call, *saved,
          *gradient);
      return static_cast<int>(cudaGetLastError());
    });
  });
}
