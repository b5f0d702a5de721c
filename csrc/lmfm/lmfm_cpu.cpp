// Steps with activations in memory between them, each divided among threads. x becomes the activations of the 1x1s
// (norm and ReLU of the map and of its pools), which are multiplied. For each level of the fusion, maps are upsampled,
// added and activated into a map with a border of zeros, whose shifted rows are multiplied by the taps of the 3x3. At
// last all branches are upsampled and activated, and multiplied by their slices of the compression.
#include "lmfm/lmfm_cpu.h"

#include "common/bilinear.h"
#include "lmfm/amx_tiles.h"
#include "lmfm/product.h"
#include "pyramid_pool/windows.h"

namespace bcmfnet::BCM_LEVEL {
namespace {

// Hands out pieces of the scratch memory; without any, it counts.
struct Arena {
  char* memory;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// The batch norm before a convolution.
struct Norm {
  const float *multiplier, *shift;
  int64_t channels;
};

// relu(norm(factor * (from + other))) of `rows` rows of `width` floats; zeros where the norm has no channel.
template <typename Tiles>
void activate(
    const float* from, const float* other, int64_t pitch, float factor, const Norm& norm, int64_t rows, int64_t width,
    typename Tiles::Value* to, int64_t to_pitch) {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t there = norm.channels - c;
    const Float multiplier = read_some<Single>(norm.multiplier + c, 1, there);
    const Float shift = read_some<Single>(norm.shift + c, 1, there);
    const Int inside = lane < static_cast<int32_t>(there < kLanes ? there : kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      Float value = load<Float>(from + r * pitch + c);
      if (other) value += load<Float>(other + r * pitch + c);
      value = larger(factor * value * multiplier + shift, fill(0.0f));
      Tiles::put(to + r * to_pitch + c, inside ? value : fill(0.0f));
    }
  }
}

// Floats [batch, height, width, pitch of the branches].
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
  const int64_t channel_pitch, breadth_pitch, output_pitch;
  const int identity;  // branches before those of the pools: 1 or 0
  const int64_t edge;  // from row to row of a map with a border of zeros, which ends one row and begins the next
  const int64_t fused_rows, padded_rows;  // of an image: whole panels, and what these read
  Arena arena;

  Value* activated[kMaxBranches];  // [whole panels of the pixels of a branch's map, channel_pitch]
  Value* shortcut = nullptr;       // [whole panels of pixels, channel_pitch]
  float* scaled[kMaxBranches];     // [whole panels of the pixels of a branch's map, breadth_pitch]
  Value* padded[kMaxBranches];     // [batch, padded_rows, breadth_pitch], of a branch with a fusing convolution
  float* fused[kMaxBranches];      // [batch, fused_rows, breadth_pitch]
  Value* joined;                   // [branches, whole panels of pixels, breadth_pitch]
  float* sums;                     // [whole panels of pixels, output_pitch]

  Fusion(const Lmfm& call, Parallel parallel, void* scratch)
      : call(call), parallel(parallel), batch(call.pyramid.batch), channels(call.pyramid.channels),
        height(call.pyramid.height), width(call.pyramid.width), image(height * width), pixels(batch * image),
        channel_pitch(round_up(channels, kChannels)), breadth_pitch(round_up(call.breadth, kChannels)),
        output_pitch(round_up(call.outputs, kChannels)), identity(call.branches - call.pyramid.pools - 1),
        edge(width + 1), fused_rows(round_up(height * edge, Tiles::kRows)), padded_rows(fused_rows + 2 * edge + 2),
        arena{static_cast<char*>(scratch)} {
    for (int i = 0; i < call.branches; ++i) scaled[i] = arena.take<float>(in_panels(pixels_of(i)) * breadth_pitch);
    sums = arena.take<float>(in_panels(pixels) * output_pitch);
    Arena later = arena;  // what is needed after the 1x1s stands where their activations were
    for (int i = 0; i < call.branches; ++i)
      activated[i] = arena.take<Value>(in_panels(pixels_of(i)) * channel_pitch);
    if (call.shortcut) shortcut = arena.take<Value>(in_panels(pixels) * channel_pitch);
    for (int i = 0; i < call.branches; ++i) {
      if (call.kernel[i] == 0) continue;
      padded[i] = later.take<Value>(batch * padded_rows * breadth_pitch);
      fused[i] = later.take<float>(batch * fused_rows * breadth_pitch);
    }
    joined = later.take<Value>(call.branches * in_panels(pixels) * breadth_pitch);
    if (later.used > arena.used) arena.used = later.used;
  }

  static int64_t in_panels(int64_t rows) { return round_up(rows, Tiles::kRows); }

  Windows windows(int branch) const { return windows_of(call.pyramid, branch - identity); }

  int64_t pixels_of(int branch) const {
    return branch < identity ? pixels : batch * windows(branch).height * windows(branch).width;
  }

  Norm norm(int64_t at, int64_t count) const { return {call.norms + at, call.norms + call.norm_stride + at, count}; }

  // kChannels channels of a row of x.
  Row x_row(int64_t n, int64_t y, int64_t channel) const {
    const int64_t at = n * call.batch_stride + channel * call.channel_stride + y * call.row_stride;
    const int64_t rest = channels - channel;
    return {at, call.channel_stride, call.column_stride, width, rest < kChannels ? rest : kChannels};
  }

  // Convolutions of the fusion, or their taps, before a branch's.
  int64_t taps_before(int branch, bool count_taps) const {
    int64_t count = 0;
    for (int i = 0; i < branch; ++i) count += count_taps ? call.kernel[i] * call.kernel[i] : call.kernel[i] > 0;
    return count;
  }

  Norm process_norm(int branch) const {
    return norm(call.branches * channels + taps_before(branch, false) * call.breadth, call.breadth);
  }

  Norm compression_norm(int branch) const {
    const int64_t before = taps_before(call.branches, false) + branch;
    return norm(call.branches * channels + before * call.breadth, call.breadth);
  }

  Map scaled_map(int branch) const {
    const int64_t h = branch < identity ? height : windows(branch).height;
    const int64_t w = branch < identity ? width : windows(branch).width;
    return {scaled[branch], h * w * breadth_pitch, w * breadth_pitch, h, w};
  }

  Map result_map(int branch) const {
    if (call.kernel[branch] == 0) return scaled_map(branch);
    return {fused[branch], fused_rows * breadth_pitch, edge * breadth_pitch, height, width};
  }

  template <typename Work>
  void divide(int64_t count, int64_t work, int64_t floats, const Work& body) const {
    const Body call_body = [](const void* context, int64_t begin, int64_t end, float* scratch) {
      (*static_cast<const Work*>(context))(begin, end, scratch);
    };
    parallel(count, work, floats, call_body, &body);
  }

  template <typename Products>
  void multiply(int64_t count, const Products& product) const {
    int64_t panels = 0;
    for (int64_t i = 0; i < count; ++i) panels += panels_of<Tiles>(product(i));
    const int64_t work = Tiles::kRows * call.breadth * call.breadth / kLanes;
    divide(panels, work, Tiles::kPackedFloats, [&](int64_t begin, int64_t end, float* scratch) {
      multiply_all<Tiles>(product, count, begin, end, scratch);
    });
  }

  void activate_row(int64_t line, float* pixels) const;
  void activate_pools(int64_t n, int64_t channel, float* scratch) const;
  void activate_all() const;
  void scale() const;
  const float* upsampled(const Map& map, int64_t n, int64_t y, float* scratch) const;
  void pad_row(int branch, int64_t n, int64_t y, float* scratch) const;
  void fuse(const int* level, int count) const;
  void fuse_all() const;
  void join() const;
  void write_out() const;
};

// One row of x, for the 1x1 of the map itself and for the shortcut.
template <typename Tiles>
void Fusion<Tiles>::activate_row(int64_t line, float* pixels) const {
  const int64_t shortcut_norms = call.norm_stride - channels;
  for (int64_t channel = 0; channel < channels; channel += kChannels) {
    read_row(call.dtype, call.x, x_row(line / height, line % height, channel), pixels, kChannels);
    const auto put = [&](int64_t norms, Value* to) {
      activate<Tiles>(
          pixels, nullptr, kChannels, 1.0f, norm(norms + channel, channels - channel), width, kChannels,
          to + line * width * channel_pitch + channel, channel_pitch);
    };
    if (identity) put(0, activated[0]);
    if (shortcut) put(shortcut_norms, shortcut);
  }
}

// What kChannels channels of one image are pooled to.
template <typename Tiles>
void Fusion<Tiles>::activate_pools(int64_t n, int64_t channel, float* scratch) const {
  const WindowRows pools(call.pyramid, scratch);
  float* const pixels = pools.free;
  for (int64_t y = 0; y < height; ++y) {
    read_row(call.dtype, call.x, x_row(n, y, channel), pixels, kChannels);
    pools.add(y, pixels, [&](int map, int64_t window) {
      const Windows& of = pools.windows[map];
      const int branch = map + identity;
      Value* const to = activated[branch] + (n * of.height + window) * of.width * channel_pitch + channel;
      activate<Tiles>(
          pools.row(map, window), nullptr, kChannels, of.share, norm(branch * channels + channel, channels - channel),
          of.width, kChannels, to, channel_pitch);
    });
  }
}

template <typename Tiles>
void Fusion<Tiles>::activate_all() const {
  const int64_t blocks = channel_pitch / kChannels;
  const int64_t floats = WindowRows::floats(call.pyramid) + width * kChannels;
  divide(batch * blocks, image * kChannels, floats, [&](int64_t begin, int64_t end, float* scratch) {
    for (int64_t task = begin; task < end; ++task) activate_pools(task / blocks, task % blocks * kChannels, scratch);
  });
  if (!identity && !shortcut) return;
  divide(batch * height, width * channels, width * kChannels, [&](int64_t begin, int64_t end, float* scratch) {
    for (int64_t line = begin; line < end; ++line) activate_row(line, scratch);
  });
}

template <typename Tiles>
void Fusion<Tiles>::scale() const {
  const char* const weights = static_cast<const char*>(call.scale);
  const int64_t bytes = channels * call.breadth * (call.dtype == DType::kFloat32 ? 4 : 2);
  multiply(call.branches + (shortcut != nullptr), [&](int64_t i) -> Product {
    if (i == call.branches)
      return {shortcut, channel_pitch, 1, {}, channels, call.shortcut, call.dtype, pixels, call.outputs, sums,
              output_pitch, false};
    return {activated[i], channel_pitch, 1, {}, channels, weights + i * bytes, call.dtype,
            pixels_of(static_cast<int>(i)), call.breadth, scaled[i], breadth_pitch, false};
  });
}

// Row y of image n of a map at the full size: where it stands, or in `scratch`, which holds two of them.
template <typename Tiles>
const float* Fusion<Tiles>::upsampled(const Map& map, int64_t n, int64_t y, float* scratch) const {
  const auto mix = [](const float* a, const float* b, float share, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Float low = load<Float>(a + i);
      store(to + i, low + share * (load<Float>(b + i) - low), kLanes);
    }
  };
  const Source rows = source_of(y, map.height, height);
  const float* line = map.at + n * map.image + rows.low * map.row;
  if (map.height != height) {
    mix(line, map.at + n * map.image + rows.high * map.row, rows.share, map.width * breadth_pitch, scratch);
    line = scratch;
  }
  if (map.width == width) return line;
  float* const to = scratch + width * breadth_pitch;
  for (int64_t x = 0; x < width; ++x) {
    const Source columns = source_of(x, map.width, width);
    const float* const low = line + columns.low * breadth_pitch;
    mix(low, line + columns.high * breadth_pitch, columns.share, breadth_pitch, to + x * breadth_pitch);
  }
  return to;
}

// Row y of what a fusing convolution reads, and the border beside it.
template <typename Tiles>
void Fusion<Tiles>::pad_row(int branch, int64_t n, int64_t y, float* scratch) const {
  const int source = call.receives[branch];
  const float* const own = upsampled(scaled_map(branch), n, y, scratch);
  const float* const received =
      source < 0 ? nullptr : upsampled(result_map(source), n, y, scratch + 2 * width * breadth_pitch);
  Value* const first = padded[branch] + n * padded_rows * breadth_pitch;
  const auto clear = [&](int64_t pixel, int64_t count) {
    std::memset(first + pixel * breadth_pitch, 0, sizeof(Value) * count * breadth_pitch);
  };
  Value* const to = first + ((y + 1) * edge + 1) * breadth_pitch;
  activate<Tiles>(
      own, received, breadth_pitch, 1.0f, process_norm(branch), width, breadth_pitch, to, breadth_pitch);
  clear((y + 1) * edge, 1);
  if (y == 0) clear(0, edge);
  if (y == height - 1) clear((height + 1) * edge, edge + 1);
}

// The convolutions of branches that do not wait for each other.
template <typename Tiles>
void Fusion<Tiles>::fuse(const int* level, int count) const {
  divide(count * batch * height, 4 * width * breadth_pitch, 4 * width * breadth_pitch,
         [&](int64_t begin, int64_t end, float* scratch) {
           for (int64_t task = begin; task < end; ++task)
             pad_row(level[task / (batch * height)], task / height % batch, task % height, scratch);
         });
  const char* const weights = static_cast<const char*>(call.process);
  const int64_t bytes = call.breadth * call.breadth * (call.dtype == DType::kFloat32 ? 4 : 2);
  multiply(count * batch, [&](int64_t i) {
    const int branch = level[i / batch];
    const int64_t n = i % batch, kernel = call.kernel[branch];
    Product product{padded[branch] + n * padded_rows * breadth_pitch, breadth_pitch,
                    static_cast<int32_t>(kernel * kernel), {edge + 1}, call.breadth,
                    weights + taps_before(branch, true) * bytes, call.dtype, height * edge, call.breadth,
                    fused[branch] + n * fused_rows * breadth_pitch, breadth_pitch, false};
    for (int64_t tap = 0; tap < 9 && kernel == 3; ++tap) product.shift[tap] = tap / 3 * edge + tap % 3;
    return product;
  });
}

template <typename Tiles>
void Fusion<Tiles>::fuse_all() const {
  bool done[kMaxBranches] = {};
  for (int left = call.branches; left > 0;) {
    int ready[kMaxBranches], level[kMaxBranches], readies = 0, count = 0;
    for (int i = 0; i < call.branches; ++i)
      if (!done[i] && (call.receives[i] < 0 || done[call.receives[i]])) ready[readies++] = i;
    for (int i = 0; i < readies; ++i) {
      done[ready[i]] = true;
      if (call.kernel[ready[i]]) level[count++] = ready[i];
    }
    if (count) fuse(level, count);
    left -= readies;
  }
}

template <typename Tiles>
void Fusion<Tiles>::join() const {
  const int64_t rows = in_panels(pixels), lines = 2 * width * breadth_pitch;
  divide(batch * height, call.branches * lines, lines, [&](int64_t begin, int64_t end, float* scratch) {
    for (int64_t line = begin; line < end; ++line)
      for (int branch = 0; branch < call.branches; ++branch) {
        const float* const from = upsampled(result_map(branch), line / height, line % height, scratch);
        Value* const to = joined + (branch * rows + line * width) * breadth_pitch;
        activate<Tiles>(from, nullptr, breadth_pitch, 1.0f, compression_norm(branch), width, breadth_pitch, to,
                        breadth_pitch);
      }
  });
  multiply(1, [&](int64_t) {
    Product product{joined, breadth_pitch, call.branches, {}, call.breadth, call.compression, call.dtype, pixels,
                    call.outputs, sums, output_pitch, shortcut != nullptr};
    for (int branch = 0; branch < call.branches; ++branch) product.shift[branch] = branch * rows;
    return product;
  });
}

template <typename Tiles>
void Fusion<Tiles>::write_out() const {
  divide(batch * height, width * output_pitch, 0, [&](int64_t begin, int64_t end, float*) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t at = line / height * call.out_batch_stride + line % height * call.out_row_stride;
      const Row row{at, call.out_channel_stride, call.out_column_stride, width, call.outputs};
      write_row(call.dtype, call.out, row, sums + line * width * output_pitch, output_pitch);
    }
  });
}

template <typename Tiles>
int64_t write(const Lmfm& call, void* scratch, Parallel parallel) {
  const Fusion<Tiles> fusion(call, parallel, scratch);
  if (scratch) {
    fusion.activate_all();
    fusion.scale();
    fusion.fuse_all();
    fusion.join();
    fusion.write_out();
  }
  return fusion.arena.used;
}

int64_t choose(const Lmfm& call, void* scratch, Parallel parallel) {
#ifdef BCM_AMX
  if (call.dtype == DType::kBFloat16 && AmxTiles::allowed()) return write<AmxTiles>(call, scratch, parallel);
#endif
  return write<FloatTiles>(call, scratch, parallel);
}

}  // namespace

int64_t lmfm_scratch_bytes(const Lmfm& call) { return choose(call, nullptr, nullptr); }

void lmfm_write(const Lmfm& call, void* scratch, Parallel parallel) { choose(call, scratch, parallel); }

}  // namespace bcmfnet::BCM_LEVEL
