// Steps with activations in memory between them, each divided among threads. x becomes the activations of the 1x1s
// (norm and ReLU of the map and of its pools), which are multiplied. For each level of the fusion, maps are upsampled,
// added and activated into a map with a border of zeros, whose shifted rows are multiplied by the taps of the 3x3. At
// last all branches are upsampled and activated, and multiplied by their slices of the compression.
#include "lmfm/lmfm_cpu.h"

#include "common/arena.h"
#include "common/bilinear.h"
#include "lmfm/amx_tiles.h"
#include "lmfm/gemm.h"
#include "pyramid_pool/windows_cpu.h"

namespace bcmfnet::BCM_ISA {
namespace {

// relu(norm(factor * (from + other))) of `rows` rows of `width` floats; zeros beyond `channels` of them.
template <typename Tiles>
void activate(
    const float* from, const float* other, int64_t pitch, float factor, const Norms& norm, int64_t channels,
    int64_t rows, int64_t width, typename Tiles::Value* to, int64_t to_pitch) {
  const Int lane = lane_numbers();
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t there = channels - c;
    const Float multiplier = read_some<Float32>(norm.multipliers + c, 1, there);
    const Float shift = read_some<Float32>(norm.shifts + c, 1, there);
    const Int inside = lane < static_cast<int32_t>(there < kLanes ? there : kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      Float value = load<Float>(from + r * pitch + c);
      if (other) value += load<Float>(other + r * pitch + c);
      value = larger(factor * value * multiplier + shift, fill(0.0f));
      Tiles::put(to + r * to_pitch + c, inside ? value : fill(0.0f));
    }
  }
}

// Floats [batch, height, width, branch_pitch].
struct Map {
  const float* at;
  int64_t image, row;  // strides
  int64_t height, width;
};

template <typename Tiles>
struct Fusion {
  using Value = typename Tiles::Value;

  const Lmfm& call;
  const Parallel parallel;
  const int64_t batch, channels, height, width, image, pixels;
  const int64_t channel_pitch, branch_pitch, output_pitch;
  const int identity;  // branches before those of the pools: 1 or 0
  const int64_t edge;  // from row to row of a map with a border of zeros, which ends one row and begins the next
  const int64_t fused_rows, padded_rows;  // of an image: whole panels, and what these read
  Arena arena;

  Value* activated[kMaxBranches];  // [whole panels of the pixels of a branch's map, channel_pitch]
  Value* shortcut = nullptr;       // [whole panels of pixels, channel_pitch]
  float* scaled[kMaxBranches];     // [whole panels of the pixels of a branch's map, branch_pitch]
  Value* padded[kMaxBranches];     // [batch, padded_rows, branch_pitch], of a branch with a fusing convolution
  float* fused[kMaxBranches];      // [batch, fused_rows, branch_pitch]
  Value* joined;                   // [branches, whole panels of pixels, branch_pitch]
  float* sums;                     // [whole panels of pixels, output_pitch]

  Fusion(const Lmfm& call, Parallel parallel, void* scratch)
      : call(call), parallel(parallel), batch(call.x.batch), channels(call.x.channels), height(call.x.height),
        width(call.x.width), image(height * width), pixels(batch * image),
        channel_pitch(round_up(channels, kChannels)), branch_pitch(round_up(call.branch_channels, kChannels)),
        output_pitch(round_up(call.out.channels, kChannels)), identity(call.branches - call.pyramid.pools - 1),
        edge(width + 1), fused_rows(round_up(height * edge, Tiles::kRows)), padded_rows(fused_rows + 2 * edge + 2),
        arena{static_cast<char*>(scratch)} {
    for (int i = 0; i < call.branches; ++i) scaled[i] = arena.take<float>(in_panels(pixels_of(i)) * branch_pitch);
    sums = arena.take<float>(in_panels(pixels) * output_pitch);
    Arena later = arena;  // What is needed after the 1x1s stands where their activations were.
    for (int i = 0; i < call.branches; ++i)
      activated[i] = arena.take<Value>(in_panels(pixels_of(i)) * channel_pitch);
    if (call.shortcut) shortcut = arena.take<Value>(in_panels(pixels) * channel_pitch);
    for (int i = 0; i < call.branches; ++i) {
      if (call.fusing[i].kernel == 0) continue;
      padded[i] = later.take<Value>(batch * padded_rows * branch_pitch);
      fused[i] = later.take<float>(batch * fused_rows * branch_pitch);
    }
    joined = later.take<Value>(call.branches * in_panels(pixels) * branch_pitch);
    arena.bytes = larger_of(arena.bytes, later.bytes);
  }

  static int64_t in_panels(int64_t rows) { return round_up(rows, Tiles::kRows); }

  Windows windows(int branch) const { return windows_of(call.pyramid, branch - identity); }

  int64_t pixels_of(int branch) const {
    return branch < identity ? pixels : batch * windows(branch).height * windows(branch).width;
  }

  // kChannels channels of a row of x, or those that are left.
  Row x_row(int64_t n, int64_t y, int64_t channel) const {
    return row_of(call.x, n, channel, y, smaller_of<int64_t>(channels - channel, kChannels));
  }

  Map scaled_map(int branch) const {
    const int64_t h = branch < identity ? height : windows(branch).height;
    const int64_t w = branch < identity ? width : windows(branch).width;
    return {scaled[branch], h * w * branch_pitch, w * branch_pitch, h, w};
  }

  Map result_map(int branch) const {
    if (call.fusing[branch].kernel == 0) return scaled_map(branch);
    return {fused[branch], fused_rows * branch_pitch, edge * branch_pitch, height, width};
  }

  template <typename Gemms>
  void multiply(int64_t count, const Gemms& gemm) const {
    int64_t panels = 0;
    for (int64_t i = 0; i < count; ++i) panels += panels_of<Tiles>(gemm(i));
    const int64_t work = Tiles::kRows * call.branch_channels * call.branch_channels / kLanes;
    const int64_t bytes = Tiles::kPackedFloats * static_cast<int64_t>(sizeof(float));
    parallel_tasks(parallel, panels, work, bytes, [&](int64_t begin, int64_t end, void* scratch) {
      multiply_all<Tiles>(gemm, count, begin, end, static_cast<float*>(scratch));
    });
  }

  void activate_row(int64_t line, float* pixels) const;
  void activate_pools(int64_t n, int64_t channel, Arena own) const;
  void activate_all() const;
  void scale() const;
  const float* upsampled(const Map& map, int64_t n, int64_t y, float* scratch) const;
  void pad_row(int branch, int64_t n, int64_t y, float* scratch) const;
  void fuse(const int* branches, int count) const;
  void fuse_all() const;
  void join() const;
  void write_out() const;
};

// One row of x, for the 1x1 of the map itself and for the shortcut.
template <typename Tiles>
void Fusion<Tiles>::activate_row(int64_t line, float* pixels) const {
  for (int64_t channel = 0; channel < channels; channel += kChannels) {
    read_row(call.x.dtype, call.x.data, x_row(line / height, line % height, channel), pixels, kChannels);
    const auto put = [&](const Norms& norms, Value* to) {
      activate<Tiles>(
          pixels, nullptr, kChannels, 1.0f, norms.from(channel), channels - channel, width, kChannels,
          to + line * width * channel_pitch + channel, channel_pitch);
    };
    if (identity) put(call.scale_norms, activated[0]);
    if (shortcut) put(call.shortcut_norms, shortcut);
  }
}

// What kChannels channels of one image are pooled to.
template <typename Tiles>
void Fusion<Tiles>::activate_pools(int64_t n, int64_t channel, Arena own) const {
  const WindowRows pools(call.pyramid, own);
  for (int64_t y = 0; y < height; ++y) {
    read_row(call.x.dtype, call.x.data, x_row(n, y, channel), pools.pixels, kChannels);
    pools.add(y, [&](int map, int64_t window) {
      const Windows& of = pools.windows[map];
      const int branch = map + identity;
      Value* const to = activated[branch] + (n * of.height + window) * of.width * channel_pitch + channel;
      activate<Tiles>(
          pools.row(map, window), nullptr, kChannels, of.weight, call.scale_norms.from(branch * channels + channel),
          channels - channel, of.width, kChannels, to, channel_pitch);
    });
  }
}

template <typename Tiles>
void Fusion<Tiles>::activate_all() const {
  const int64_t blocks = channel_pitch / kChannels;
  Arena count{nullptr};
  WindowRows(call.pyramid, count);
  parallel_tasks(
      parallel, batch * blocks, image * kChannels, count.bytes, [&](int64_t begin, int64_t end, void* scratch) {
        const Arena own{static_cast<char*>(scratch)};
        for (int64_t task = begin; task < end; ++task) activate_pools(task / blocks, task % blocks * kChannels, own);
      });
  if (!identity && !shortcut) return;
  const int64_t bytes = width * kChannels * static_cast<int64_t>(sizeof(float));
  parallel_tasks(parallel, batch * height, width * channels, bytes, [&](int64_t begin, int64_t end, void* scratch) {
    for (int64_t line = begin; line < end; ++line) activate_row(line, static_cast<float*>(scratch));
  });
}

template <typename Tiles>
void Fusion<Tiles>::scale() const {
  const char* const weights = static_cast<const char*>(call.scale);
  const int64_t bytes = channels * call.branch_channels * (call.x.dtype == DType::kFloat32 ? 4 : 2);
  multiply(call.branches + (shortcut != nullptr), [&](int64_t i) -> Gemm {
    if (i == call.branches)
      return {shortcut, channel_pitch, 1, {}, channels, call.shortcut, call.x.dtype, pixels, call.out.channels, sums,
              output_pitch, false};
    return {activated[i], channel_pitch, 1, {}, channels, weights + i * bytes, call.x.dtype,
            pixels_of(static_cast<int>(i)), call.branch_channels, scaled[i], branch_pitch, false};
  });
}

// Row y of image n of a map at the full size: where it stands, or in `scratch`, which holds two of them.
template <typename Tiles>
const float* Fusion<Tiles>::upsampled(const Map& map, int64_t n, int64_t y, float* scratch) const {
  const auto mix = [](const float* a, const float* b, float weight, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Float low = load<Float>(a + i);
      store(to + i, low + weight * (load<Float>(b + i) - low), kLanes);
    }
  };
  const Source rows = source_of(y, map.height, height);
  const float* line = map.at + n * map.image + rows.low * map.row;
  if (map.height != height) {
    mix(line, map.at + n * map.image + rows.high * map.row, rows.weight, map.width * branch_pitch, scratch);
    line = scratch;
  }
  if (map.width == width) return line;
  float* const to = scratch + width * branch_pitch;
  for (int64_t x = 0; x < width; ++x) {
    const Source columns = source_of(x, map.width, width);
    const float* const low = line + columns.low * branch_pitch;
    mix(low, line + columns.high * branch_pitch, columns.weight, branch_pitch, to + x * branch_pitch);
  }
  return to;
}

// Row y of what a fusing convolution reads, and the border beside it.
template <typename Tiles>
void Fusion<Tiles>::pad_row(int branch, int64_t n, int64_t y, float* scratch) const {
  const int source = call.fusing[branch].receives;
  const float* const own = upsampled(scaled_map(branch), n, y, scratch);
  const float* const received =
      source < 0 ? nullptr : upsampled(result_map(source), n, y, scratch + 2 * width * branch_pitch);
  Value* const first = padded[branch] + n * padded_rows * branch_pitch;
  const auto clear = [&](int64_t pixel, int64_t count) {
    std::memset(first + pixel * branch_pitch, 0, sizeof(Value) * count * branch_pitch);
  };
  Value* const to = first + ((y + 1) * edge + 1) * branch_pitch;
  const Norms norm = call.process_norms.from(call.fusing[branch].number * call.branch_channels);
  activate<Tiles>(
      own, received, branch_pitch, 1.0f, norm, call.branch_channels, width, branch_pitch, to, branch_pitch);
  clear((y + 1) * edge, 1);
  if (y == 0) clear(0, edge);
  if (y == height - 1) clear((height + 1) * edge, edge + 1);
}

// The convolutions of branches that do not wait for each other.
template <typename Tiles>
void Fusion<Tiles>::fuse(const int* branches, int count) const {
  const int64_t lines = 4 * width * branch_pitch;
  parallel_tasks(
      parallel, count * batch * height, lines, lines * static_cast<int64_t>(sizeof(float)),
      [&](int64_t begin, int64_t end, void* scratch) {
        for (int64_t task = begin; task < end; ++task) {
          const int branch = branches[task / (batch * height)];
          pad_row(branch, task / height % batch, task % height, static_cast<float*>(scratch));
        }
      });
  const char* const weights = static_cast<const char*>(call.process);
  const int64_t bytes = call.branch_channels * call.branch_channels * (call.x.dtype == DType::kFloat32 ? 4 : 2);
  multiply(count * batch, [&](int64_t i) {
    const int branch = branches[i / batch];
    const int64_t n = i % batch, kernel = call.fusing[branch].kernel;
    Gemm gemm{padded[branch] + n * padded_rows * branch_pitch, branch_pitch, static_cast<int32_t>(kernel * kernel),
              {edge + 1}, call.branch_channels, weights + call.fusing[branch].tap * bytes, call.x.dtype,
              height * edge, call.branch_channels, fused[branch] + n * fused_rows * branch_pitch, branch_pitch, false};
    for (int64_t tap = 0; tap < 9 && kernel == 3; ++tap) gemm.shift[tap] = tap / 3 * edge + tap % 3;
    return gemm;
  });
}

template <typename Tiles>
void Fusion<Tiles>::fuse_all() const {
  for (int level = 1; level <= call.branches; ++level) {
    int branches[kMaxBranches], count = 0;
    for (int i = 0; i < call.branches; ++i)
      if (call.fusing[i].level == level) branches[count++] = i;
    if (count > 0) fuse(branches, count);
  }
}

template <typename Tiles>
void Fusion<Tiles>::join() const {
  const int64_t rows = in_panels(pixels), lines = 2 * width * branch_pitch;
  parallel_tasks(
      parallel, batch * height, call.branches * lines, lines * static_cast<int64_t>(sizeof(float)),
      [&](int64_t begin, int64_t end, void* scratch) {
        for (int64_t line = begin; line < end; ++line)
          for (int i = 0; i < call.branches; ++i) {
            float* const held = static_cast<float*>(scratch);
            const float* const from = upsampled(result_map(i), line / height, line % height, held);
            Value* const to = joined + (i * rows + line * width) * branch_pitch;
            const Norms norm = call.compression_norms.from(i * call.branch_channels);
            activate<Tiles>(
                from, nullptr, branch_pitch, 1.0f, norm, call.branch_channels, width, branch_pitch, to, branch_pitch);
          }
      });
  multiply(1, [&](int64_t) {
    Gemm gemm{joined, branch_pitch, call.branches, {}, call.branch_channels, call.compression, call.x.dtype, pixels,
              call.out.channels, sums, output_pitch, shortcut != nullptr};
    for (int i = 0; i < call.branches; ++i) gemm.shift[i] = i * rows;
    return gemm;
  });
}

template <typename Tiles>
void Fusion<Tiles>::write_out() const {
  parallel_tasks(parallel, batch * height, width * output_pitch, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t line = begin; line < end; ++line) {
      const Row row = row_of(call.out, line / height, 0, line % height, call.out.channels);
      write_row(call.out.dtype, call.out.data, row, sums + line * width * output_pitch, output_pitch);
    }
  });
}

template <typename Tiles>
int64_t run(const Lmfm& call, void* scratch, Parallel parallel) {
  const Fusion<Tiles> fusion(call, parallel, scratch);
  if (scratch) {
    fusion.activate_all();
    fusion.scale();
    fusion.fuse_all();
    fusion.join();
    fusion.write_out();
  }
  return fusion.arena.bytes;
}

// Bytes that the call works in; it runs if it is given them. Branches narrower than a tile would multiply padding, and
// have sums too short for the rounded activations to even out.
int64_t choose(const Lmfm& call, void* scratch, Parallel parallel) {
#ifdef BCM_AMX
  const bool fills_tiles = call.branch_channels >= AmxTiles::kTile;
  if (call.x.dtype == DType::kBFloat16 && fills_tiles && has_amx())
    return run<AmxTiles>(call, scratch, parallel);
#endif
  return run<FloatTiles>(call, scratch, parallel);
}

}  // namespace

int64_t lmfm_scratch_bytes_cpu(const Lmfm& call) { return choose(call, nullptr, nullptr); }

void lmfm_cpu(const Lmfm& call, void* scratch, Parallel parallel) { choose(call, scratch, parallel); }

}  // namespace bcmfnet::BCM_ISA
