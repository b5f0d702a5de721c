// The room of logits at full resolution: a row of pixels is read chunk by chunk.
#include "bcl/line_cpu.h"

namespace bcmfnet::BCM_ISA {
namespace {

constexpr int64_t kChunk = 64;  // pixels of a row whose logits are held at a time

// Logits of kLanes columns of a chunk.
struct Planes {
  const float* at_position;

  Float operator()(int64_t c) const { return load<Float>(at_position + c * kChunk); }

  // sum_c w[c] (z - best)
  Float spread(const SpreadWeights& weights, int64_t classes, Float best) const {
    Float sum = fill(0.0f);
    for (int64_t c = 0; c < classes; ++c)
      if (weights.of_class[c] != 0) sum += weights.of_class[c] * ((*this)(c) - best);
    return sum;
  }
};

// Logits of kChunk columns of a row, [classes, kChunk]; of binary logits the first class has zeros.
struct Chunk {
  const View& logits;
  const int64_t classes, first;  // the class of the first channel
  float* planes;
  int64_t count = 0;

  Chunk(const Bcl& call, const View& logits, Arena& arena)
      : logits(logits), classes(logits.data ? classes_of(call) : 0), first(classes_of(call) - call.logits.channels),
        planes(arena.take<float>(classes * kChunk)) {}

  void read(int64_t image, int64_t y, int64_t x) {
    count = smaller_of(logits.width - x, kChunk);
    if (first > 0) std::memset(planes, 0, first * kChunk * sizeof(float));
    for (int64_t c = 0; c < logits.channels; ++c) {
      float* plane = planes + (first + c) * kChunk;
      read_plane(logits.dtype, logits.data, offset_of(logits, image, c, y, x), logits.column_stride, count, plane);
      for (int64_t i = count; i < kChunk; ++i) plane[i] = 0;
    }
  }

  // Write `factor` times what the planes hold.
  void write(const View& to, int64_t image, int64_t y, int64_t x, float factor) const {
    for (int64_t c = 0; c < to.channels; ++c) {
      const int64_t at = offset_of(to, image, c, y, x);
      write_plane(to.dtype, to.data, at, to.column_stride, count, factor, planes + (first + c) * kChunk);
    }
  }
};

// work(image, y, unit, line, chunk, teacher) for each row of pixels; the teacher's chunk is empty without distillation.
template <typename Work>
void each_row(const Run& run, Work work) {
  const View none{}, &of_teacher = distills(run.call) ? run.call.teacher : none;
  Arena needed{nullptr};
  Line(run, needed), Chunk(run.call, run.call.logits, needed), Chunk(run.call, of_teacher, needed);
  run.parallel_units(needed.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    Line line(run, arena);
    Chunk chunk(run.call, run.call.logits, arena), teacher(run.call, of_teacher, arena);
    for (int64_t unit = begin; unit < end; ++unit)
      work(unit / run.call.logits.height, unit % run.call.logits.height, unit, line, chunk, teacher);
  });
}

// log sum exp(z - max z) of kLanes positions.
Float read_lse(const Line& line, int64_t position) {
  const int32_t width = static_cast<int32_t>(line.call.target.width);
  const Int column = load<Int>(line.columns.column + position);
  return gather(line.maps.lse + line.row * width, column < width ? column : fill(0));
}

template <bool kTerms>
void score(const Run& run) {
  each_row(run, [&](int64_t image, int64_t y, int64_t unit, Line& line, Chunk& chunk, Chunk& teacher) {
    RowStats& stats = run.by_unit[unit];
    line.begin_unit();
    line.read_labels(image, y, false);
    for (int64_t x = 0; x < run.call.target.width; x += kChunk) {
      TermSums sums;  // of a chunk: a float that adds up a long row loses digits
      chunk.read(image, y, x);
      if (teacher.classes > 0) teacher.read(image, y, x);
      for (int64_t i = 0; i < chunk.count; i += kLanes)
        line.evaluate<kTerms, kTerms, false>(
            Planes{chunk.planes + i}, Planes{teacher.planes + i}, x + i, unit, stats, sums);
      sums.add_to<kTerms, false>(stats);
    }
    line.end_unit(unit);
    line.write_maps();
  });
}

// The gradient of the pixels at kLanes positions, in the place of their logits.
void differentiate(const Line& line, int64_t position, float* planes) {
  const Planes logits{planes};
  const Labels labels = line.labels(position);
  const Amounts<Float> amounts = amounts_of<false>(line.pixels, labels, fill(1.0f), {}, line.run.factors);
  const Taking taking(line.call, labels, amounts, amounts.total != 0.0f);
  const int64_t classes = line.pixels.classes;
  const Float best = largest(logits, classes), factor = amounts.total * exp(-read_lse(line, position));
  for (int64_t c = 0; c < classes; ++c)
    store(planes + c * kChunk, taking(c, factor * exp(logits(c) - best)), kLanes);
}

void differentiate_terms(Line& line, const Planes& teacher, int64_t position, int64_t image, float* planes) {
  TermSums known;
  line.evaluate_again(Planes{planes}, teacher, position, known);
  line.gradient(position, image).use([&](const auto& gradient) {
    for (int64_t c = 0; c < line.pixels.classes; ++c) store(planes + c * kChunk, gradient(c), kLanes);
  });
}

}  // namespace

void score_full(const Run& run) {
  if (has_terms(run.call)) {
    score<true>(run);
  } else {
    score<false>(run);
  }
}

void write_gradient(const Run& run, float grad, const View& gradient) {
  const Bcl& call = run.call;
  const bool terms = has_terms(call);
  each_row(run, [&](int64_t image, int64_t y, int64_t, Line& line, Chunk& chunk, Chunk& teacher) {
    line.read_labels(image, y, selects(call));
    for (int64_t x = 0; x < call.target.width; x += kChunk) {
      chunk.read(image, y, x);
      if (teacher.classes > 0) teacher.read(image, y, x);
      for (int64_t i = 0; i < chunk.count; i += kLanes) {
        if (terms) {
          differentiate_terms(line, Planes{teacher.planes + i}, x + i, image, chunk.planes + i);
        } else {
          differentiate(line, x + i, chunk.planes + i);
        }
      }
      if (chunk.classes == 1) std::memset(chunk.planes, 0, kChunk * sizeof(float));  // of NaN too
      chunk.write(gradient, image, y, x, grad);
    }
  });
}

}  // namespace bcmfnet::BCM_ISA
