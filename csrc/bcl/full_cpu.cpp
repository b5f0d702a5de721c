// The room of logits at full resolution: a row of pixels is read chunk by chunk.
#include "bcl/pixels_cpu.h"

namespace bcmfnet::BCM_ISA {
namespace {

constexpr int64_t kChunk = 64;  // pixels of a row whose logits are held at a time

// Logits of kLanes columns of a chunk.
struct Planes {
  const float* at_position;

  Float operator()(int64_t c) const { return load<Float>(at_position + c * kChunk); }
};

// Logits of kChunk columns of a row, [classes, kChunk].
struct Chunk {
  const Bcl& call;
  float* planes;
  int64_t count = 0;

  Chunk(const Bcl& call, Arena& arena) : call(call), planes(arena.take<float>(call.logits.channels * kChunk)) {}

  void read(int64_t image, int64_t y, int64_t x) {
    const View& logits = call.logits;
    count = smaller_of(logits.width - x, kChunk);
    for (int64_t c = 0; c < logits.channels; ++c) {
      float* plane = planes + c * kChunk;
      read_plane(logits.dtype, logits.data, offset_of(logits, image, c, y, x), logits.column_stride, count, plane);
      for (int64_t i = count; i < kChunk; ++i) plane[i] = 0;
    }
  }

  // Write `factor` times what the planes hold.
  void write(const View& to, int64_t image, int64_t y, int64_t x, float factor) const {
    for (int64_t c = 0; c < to.channels; ++c) {
      const int64_t at = offset_of(to, image, c, y, x);
      write_plane(to.dtype, to.data, at, to.column_stride, count, factor, planes + c * kChunk);
    }
  }
};

// work(image, y, unit, line, chunk) for each row of pixels.
template <typename Work>
void each_row(const Run& run, Work work) {
  Arena needed{nullptr};
  Line(run, needed), Chunk(run.call, needed);
  run.parallel_units(needed.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    Line line(run, arena);
    Chunk chunk(run.call, arena);
    for (int64_t unit = begin; unit < end; ++unit)
      work(unit / run.call.logits.height, unit % run.call.logits.height, unit, line, chunk);
  });
}

// log sum exp(z - max z) of kLanes positions.
Float read_lse(const Line& line, int64_t position) {
  const int32_t width = static_cast<int32_t>(line.call.target.width);
  const Int column = load<Int>(line.columns.column + position);
  return gather(line.maps.lse + line.row * width, column < width ? column : fill(0));
}

}  // namespace

void score_full(const Run& run) {
  each_row(run, [&](int64_t image, int64_t y, int64_t unit, Line& line, Chunk& chunk) {
    RowStats& stats = run.by_unit[unit];
    line.read_labels(image, y, false);
    for (int64_t x = 0; x < run.call.target.width; x += kChunk) {
      Float ce = fill(0.0f);  // of a chunk: a float that adds up a long row loses digits
      chunk.read(image, y, x);
      for (int64_t i = 0; i < chunk.count; i += kLanes)
        line.evaluate<false>(Planes{chunk.planes + i}, x + i, stats, ce);
      stats.ce += sum_of(ce);
    }
    line.write_maps();
  });
}

void write_gradient(const Run& run, const float* scales, float grad, const View& gradient) {
  const Bcl& call = run.call;
  const int64_t classes = call.logits.channels;
  const float of_ce = call.options.ce_weight * scales[0], of_boundary = call.options.boundary_weight * scales[1];
  each_row(run, [&](int64_t image, int64_t y, int64_t, Line& line, Chunk& chunk) {
    line.read_labels(image, y, selects(call));
    for (int64_t x = 0; x < call.target.width; x += kChunk) {
      chunk.read(image, y, x);
      for (int64_t i = 0; i < chunk.count; i += kLanes) {
        float* const planes = chunk.planes + i;
        const Planes logits{planes};
        const Labels labels = line.labels(x + i);
        const Amounts<Float> amounts = amounts_of(call, labels, of_ce, of_boundary);
        const Taking taking(call, labels, amounts);
        const Float best = largest(logits, classes), factor = amounts.total * exp(-read_lse(line, x + i));
        for (int64_t c = 0; c < classes; ++c)
          store(planes + c * kChunk, taking(c, factor * exp(logits(c) - best)), kLanes);
      }
      if (classes == 1) std::memset(chunk.planes, 0, kChunk * sizeof(float));  // of NaN too
      chunk.write(gradient, image, y, x, grad);
    }
  });
}

}  // namespace bcmfnet::BCM_ISA
