// The module on a GPU, as a sequence of launches without a wait:
//
//   pools       of x, by pyramid_pool
//   scale       the 1x1 of each branch, and the shortcut
//   process     the fusing convolutions, a launch for those that wait for no other of their launch
//   compression the 1x1 of all branches, and the sum with the shortcut
//
// All but the first are the products of gemm_cuda.h, several of them in one launch.
#include "lmfm/lmfm_cuda.h"

#include "common/arena.h"
#include "lmfm/gemm_cuda.h"
#include "pyramid_pool/pyramid_pool_cuda.h"

namespace bcmfnet {
namespace {

// Whether `group` channels of a map, from a multiple of it, may be read or written at once.
bool in_vectors(const Map& map, int64_t channels, int64_t group, int64_t size) {
  const int64_t bytes = smaller_of<int64_t>(group * size, 16);
  return map.channel_stride == 1 && channels % group == 0 && map.batch_stride % group == 0 &&
         map.row_stride % group == 0 && map.column_stride % group == 0 &&
         reinterpret_cast<uintptr_t>(map.values) % bytes == 0;
}

// A channels_last map whose pixels are `pitch` elements apart.
Map channels_last(void* values, int64_t height, int64_t width, int64_t pitch) {
  return {values, static_cast<int>(height), static_cast<int>(width), height * width * pitch, 1, width * pitch, pitch,
          false};
}

class Module {
 public:
  Module(const Lmfm& call, void* memory)
      : call_(call), size_(call.x.dtype == DType::kFloat32 ? 4 : 2), height_(call.x.height), width_(call.x.width) {
    Arena arena{static_cast<char*>(memory)};
    pooled_ = arena.take<char>(call.x.batch * call.x.channels * pooled_before(call.branches) * size_);
    for (int i = 0; i < call.branches; ++i) {
      scaled_[i] = dense(arena, size(i).height, size(i).width, call.branch_channels);
      fused_[i] = call.fusing[i].kernel > 0 ? dense(arena, height_, width_, call.branch_channels) : scaled_[i];
    }
    if (call.shortcut != nullptr) shortcut_ = dense(arena, height_, width_, call.out.channels);
    bytes_ = arena.bytes;
  }

  int64_t bytes() const { return bytes_; }

  int run(void* stream) const {
    const PyramidPool pools{pyramid(), call_.x, pooled_, true};
    BCM_TRY(pyramid_pool_cuda(&pools, stream));
    BCM_TRY(launch_gemms(call_.x.dtype, scale(), stream));
    for (int level = 1; level <= call_.branches; ++level)
      BCM_TRY(launch_gemms(call_.x.dtype, process(level), stream));
    return launch_gemms(call_.x.dtype, compression(), stream);
  }

 private:
  const Pyramid& pyramid() const { return call_.pyramid; }

  // A map in scratch memory, whose pixels are padded for vectors.
  Map dense(Arena& arena, int64_t height, int64_t width, int64_t channels) const {
    const int64_t pitch = round_up(channels, kGroup);
    Map map = channels_last(arena.take<char>(call_.x.batch * height * width * pitch * size_), height, width, pitch);
    map.vectors = true;
    return map;
  }

  Map map_of(const View& view, int64_t group) const {
    Map map{view.data, static_cast<int>(view.height), static_cast<int>(view.width), view.batch_stride,
            view.channel_stride, view.row_stride, view.column_stride, false};
    map.vectors = in_vectors(map, view.channels, group, size_);
    return map;
  }

  struct Size {
    int64_t height, width;
  };

  // Branches before those of the pools: 1 or 0.
  int identity() const { return call_.branches - pyramid().pools - 1; }

  // Of the map that a branch's first 1x1 reads.
  Size size(int branch) const {
    const int number = branch - identity();
    if (number < 0) return {height_, width_};
    return number < pyramid().pools ? Size{pyramid().pool[number].height, pyramid().pool[number].width} : Size{1, 1};
  }

  // Positions of the pooled maps before a branch's.
  int64_t pooled_before(int branch) const {
    int64_t positions = 0;
    for (int i = identity(); i < branch; ++i) positions += size(i).height * size(i).width;
    return positions;
  }

  // What a branch's first 1x1 reads: x, or one of the pooled maps that lie one after the other.
  Map unscaled(int branch) const {
    if (branch < identity()) return map_of(call_.x, kGroup);
    const int64_t channels = call_.x.channels, before = pooled_before(branch) * call_.x.batch * channels * size_;
    Map map = channels_last(pooled_ + before, size(branch).height, size(branch).width, channels);
    map.vectors = in_vectors(map, channels, kGroup, size_);
    return map;
  }

  const void* at(const void* weights, int64_t elements) const {
    return static_cast<const char*>(weights) + elements * size_;
  }

  void add(Gemms& launch, const void* weights, int side, int64_t channels, int64_t outputs, const Map& out,
           const Map& added = {}) const {
    launch.add(call_.x.dtype, weights, side, channels, outputs, call_.x.batch, out, added);
  }

  Gemms scale() const {
    const int64_t channels = call_.x.channels, outputs = call_.branch_channels;
    Gemms launch{};
    if (call_.shortcut != nullptr) {
      launch.add(map_of(call_.x, kGroup), {}, call_.shortcut_norms, channels);
      add(launch, call_.shortcut, 1, channels, call_.out.channels, shortcut_);
    }
    for (int i = 0; i < call_.branches; ++i) {
      launch.add(unscaled(i), {}, call_.scale_norms.from(i * channels), channels);
      add(launch, at(call_.scale, i * channels * outputs), 1, channels, outputs, scaled_[i]);
    }
    return launch;
  }

  Gemms process(int level) const {
    const int64_t channels = call_.branch_channels;
    Gemms launch{};
    for (int i = 0; i < call_.branches; ++i) {
      const Fusing& fusing = call_.fusing[i];
      if (fusing.level != level) continue;
      const Map received = fusing.receives < 0 ? Map{} : fused_[fusing.receives];
      launch.add(scaled_[i], received, call_.process_norms.from(fusing.number * channels), channels);
      add(launch, at(call_.process, fusing.tap * channels * channels), fusing.kernel, channels, channels, fused_[i]);
    }
    return launch;
  }

  Gemms compression() const {
    Gemms launch{};
    for (int i = 0; i < call_.branches; ++i)
      launch.add(fused_[i], {}, call_.compression_norms.from(i * call_.branch_channels), call_.branch_channels);
    add(launch, call_.compression, 1, call_.branch_channels, call_.out.channels, map_of(call_.out, 4), shortcut_);
    return launch;
  }

  const Lmfm& call_;
  const int64_t size_, height_, width_;
  char* pooled_;  // what pyramid_pool writes
  Map scaled_[kMaxBranches], fused_[kMaxBranches], shortcut_{};
  int64_t bytes_;
};

}  // namespace
}  // namespace bcmfnet

extern "C" int64_t lmfm_scratch_bytes_cuda(const bcmfnet::Lmfm* call) {
  return bcmfnet::Module(*call, nullptr).bytes();
}

extern "C" int lmfm_cuda(const bcmfnet::Lmfm* call, void* scratch, void* stream) {
  return bcmfnet::Module(*call, scratch).run(stream);
}
