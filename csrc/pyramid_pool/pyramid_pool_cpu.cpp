// A block of channels of one image at a time, row after row. Forward, a row of the map is added to the sums of the
// windows that have it; backward, it is made of the rows of cotangents whose windows have it. Either way the rows of
// the pooled maps that are in hand stay in the first cache, and both tensors are read or written once.
#include "pyramid_pool/pyramid_pool_cpu.h"

#include "pyramid_pool/windows_cpu.h"

namespace bcmfnet::BCM_ISA {
namespace {

int64_t blocks_of(const Pyramid& pyramid) { return ceil_div(pyramid.channels, kChannels); }

// One block of channels, and where its rows are.
struct Block {
  const PyramidPool& call;
  int64_t image, channel, channels;

  Block(const PyramidPool& call, int64_t task)
      : call(call), image(task / blocks_of(call.pyramid)), channel(task % blocks_of(call.pyramid) * kChannels),
        channels(smaller_of<int64_t>(call.pyramid.channels - channel, kChannels)) {}

  Row map_row(int64_t y) const { return row_of(call.map, image, channel, y, channels); }

  // A row of pooled map number `map`.
  Row packed_row(const WindowRows& sums, int map, int64_t y) const {
    int64_t at = 0;  // The image's channel, counted in planes, comes after the maps before this one.
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

void pool(const Block& block, Arena arena) {
  const PyramidPool& call = block.call;
  const WindowRows sums(call.pyramid, arena);
  for (int64_t y = 0; y < call.pyramid.height; ++y) {
    read_row(call.map.dtype, call.map.data, block.map_row(y), sums.pixels, kChannels);
    sums.add(y, [&](int map, int64_t window) {
      const Windows& windows = sums.windows[map];
      scale(sums.row(map, window), windows.width * kChannels, windows.weight);
      write_row(call.map.dtype, call.packed, block.packed_row(sums, map, window), sums.row(map, window), kChannels);
    });
  }
}

// Add to row y of the map what the windows of one pool that have it carry.
void spread(const WindowRows& cotangents, int map, int64_t y) {
  const Windows windows = cotangents.windows[map];
  float *const line = cotangents.line, *const pixels = cotangents.pixels;
  const Range<int64_t> over = windows.over_row(y);
  const int64_t count = windows.width * kChannels, width = cotangents.pyramid.width;
  if (over.begin >= over.end) return;
  std::memcpy(line, cotangents.row(map, over.begin), sizeof(float) * count);
  for (int64_t window = over.begin + 1; window < over.end; ++window)
    add_floats(cotangents.row(map, window), count, line);
  for (int64_t x = 0; x < windows.width; ++x) {
    const Range<int64_t> columns = windows.positions(x, width);
    for (int64_t column = columns.begin; column < columns.end; ++column)
      add_floats(line + x * kChannels, kChannels, pixels + column * kChannels);
  }
}

void unpool(const Block& block, Arena arena) {
  const PyramidPool& call = block.call;
  const WindowRows cotangents(call.pyramid, arena);
  for (int64_t y = 0; y < call.pyramid.height; ++y) {
    std::memset(cotangents.pixels, 0, sizeof(float) * call.pyramid.width * kChannels);
    for (int map = 0; map < cotangents.maps; ++map) {
      const Windows& windows = cotangents.windows[map];
      const Range<int64_t> over = windows.over_row(y);
      for (int64_t window = over.begin; window < over.end; ++window) {
        if (windows.positions(window, call.pyramid.height).begin != y) continue;
        float* const row = cotangents.row(map, window);
        read_row(call.map.dtype, call.packed, block.packed_row(cotangents, map, window), row, kChannels);
        scale(row, windows.width * kChannels, windows.weight);
      }
      spread(cotangents, map, y);
    }
    write_row(call.map.dtype, call.map.data, block.map_row(y), cotangents.pixels, kChannels);
  }
}

// A task is a block of channels of one image.
template <typename Work>
void each_block(const PyramidPool& call, Parallel parallel, Work work) {
  const Pyramid& map = call.pyramid;
  const int64_t tasks = map.batch * blocks_of(map);
  Arena count{nullptr};
  WindowRows(map, count);
  const int64_t steps = map.batch * map.channels * map.height * map.width / tasks;
  parallel_tasks(parallel, tasks, steps, count.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    for (int64_t task = begin; task < end; ++task) work(Block(call, task), Arena{static_cast<char*>(scratch)});
  });
}

}  // namespace

void pyramid_pool_cpu(const PyramidPool& call, Parallel parallel) { each_block(call, parallel, pool); }

void pyramid_pool_backward_cpu(const PyramidPool& call, Parallel parallel) { each_block(call, parallel, unpool); }

}  // namespace bcmfnet::BCM_ISA
