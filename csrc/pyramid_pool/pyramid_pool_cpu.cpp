// A block of channels of one image at a time, row after row. Forward, a row of the map is added to the sums of the
// windows that have it; backward, it is made of the rows of cotangents whose windows have it. Either way the rows of
// the pooled maps that are in hand stay in the first cache, and both tensors are read or written once.
#include "pyramid_pool/pyramid_pool_cpu.h"

#include "pyramid_pool/windows.h"

namespace bcmfnet::BCM_LEVEL {
namespace {

int64_t blocks_of(const Pyramid& pyramid) { return (pyramid.channels + kChannels - 1) / kChannels; }

// One block of channels: where its rows are.
struct Block {
  const PyramidPool& call;
  int64_t image, channel, channels;

  Block(const PyramidPool& call, int64_t task)
      : call(call), image(task / blocks_of(call.pyramid)), channel(task % blocks_of(call.pyramid) * kChannels) {
    const int64_t rest = call.pyramid.channels - channel;
    channels = rest < kChannels ? rest : kChannels;
  }

  Row map_row(int64_t y) const {
    const int64_t at = image * call.batch_stride + channel * call.channel_stride + y * call.row_stride;
    return {at, call.channel_stride, call.column_stride, call.pyramid.width, channels};
  }

  // A row of pooled map number `map`.
  Row packed_row(const WindowRows& sums, int map, int64_t y) const {
    int64_t at = 0;  // of the image and channel in a sequence of planes
    for (int i = 0; i < map; ++i) at += call.pyramid.batch * sums.windows[i].height * sums.windows[i].width;
    const int64_t width = sums.windows[map].width, plane = sums.windows[map].height * width;
    at = (at + image * plane) * call.pyramid.channels;
    if (call.channels_last) {
      const int64_t pitch = call.pyramid.channels;
      return {at + y * width * pitch + channel, 1, pitch, width, channels};
    }
    return {at + channel * plane + y * width, plane, 1, width, channels};
  }
};

void scale(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += kLanes) store(values + i, factor * load<Float>(values + i), kLanes);
}

void pool(const Block& block, float* scratch) {
  const PyramidPool& call = block.call;
  const WindowRows sums(call.pyramid, scratch);
  float* const pixels = sums.free;
  for (int64_t y = 0; y < call.pyramid.height; ++y) {
    read_row(call.dtype, call.map, block.map_row(y), pixels, kChannels);
    sums.add(y, pixels, [&](int map, int64_t window) {
      const Windows& windows = sums.windows[map];
      scale(sums.row(map, window), windows.width * kChannels, windows.share);
      write_row(call.dtype, call.packed, block.packed_row(sums, map, window), sums.row(map, window), kChannels);
    });
  }
}

// Add to row y of the map what the windows of one pool that have it carry.
void spread(const WindowRows& cotangents, int map, int64_t y, float* pixels) {
  const Windows& windows = cotangents.windows[map];
  const int64_t first = windows.begin_over(y), last = windows.end_over(y), count = windows.width * kChannels;
  if (first >= last) return;
  std::memcpy(cotangents.line, cotangents.row(map, first), sizeof(float) * count);
  for (int64_t window = first + 1; window < last; ++window)
    add_floats(cotangents.row(map, window), count, cotangents.line);
  for (int64_t x = 0; x < windows.width; ++x) {
    const int64_t end = windows.end(x, cotangents.pyramid.width);
    for (int64_t column = windows.begin(x); column < end; ++column)
      add_floats(cotangents.line + x * kChannels, kChannels, pixels + column * kChannels);
  }
}

void unpool(const Block& block, float* scratch) {
  const PyramidPool& call = block.call;
  const WindowRows cotangents(call.pyramid, scratch);
  float* const pixels = cotangents.free;
  for (int64_t y = 0; y < call.pyramid.height; ++y) {
    std::memset(pixels, 0, sizeof(float) * call.pyramid.width * kChannels);
    for (int map = 0; map < cotangents.maps; ++map) {
      const Windows& windows = cotangents.windows[map];
      for (int64_t window = windows.begin_over(y); window < windows.end_over(y); ++window) {
        if (windows.begin(window) != y) continue;
        float* const row = cotangents.row(map, window);
        read_row(call.dtype, call.packed, block.packed_row(cotangents, map, window), row, kChannels);
        scale(row, windows.width * kChannels, windows.share);
      }
      spread(cotangents, map, y, pixels);
    }
    write_row(call.dtype, call.map, block.map_row(y), pixels, kChannels);
  }
}

}  // namespace

int64_t pyramid_pool_tasks(const PyramidPool& call) { return call.pyramid.batch * blocks_of(call.pyramid); }

int64_t pyramid_pool_scratch(const PyramidPool& call) {
  return WindowRows::floats(call.pyramid) + call.pyramid.width * kChannels;
}

void pyramid_pool_blocks(const PyramidPool& call, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) pool(Block(call, task), scratch);
}

void pyramid_pool_backward_blocks(const PyramidPool& call, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) unpool(Block(call, task), scratch);
}

}  // namespace bcmfnet::BCM_LEVEL
