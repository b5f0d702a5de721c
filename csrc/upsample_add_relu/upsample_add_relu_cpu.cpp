// One row of the result at a time: the two source rows, widened to floats, are blended into one, whose columns are then
// blended in registers on their way to the sum. Rows come first, since their blend is made at the width of `low`.
#include "upsample_add_relu/upsample_add_relu_cpu.h"

#include <utility>

#include "common/arena.h"
#include "common/bilinear.h"
#include "common/rows.h"
#include "common/simd.h"

namespace bcmfnet::BCM_ISA {
namespace {

bool has_pixels(const UpsampleAddReLU& call) { return is_channels_last(call) && call.high.channels > 1; }

int64_t planes_of(const UpsampleAddReLU& call) { return has_pixels(call) ? 1 : call.high.channels; }

// Floats of a row of `low`: pixels of whole vectors, or columns and a vector that repeats the last one.
int64_t row_floats(const UpsampleAddReLU& call) {
  if (has_pixels(call)) return call.low.width * round_up(call.low.channels, kLanes);
  return round_up(call.low.width, kLanes) + kLanes;
}

Float lerp(Float a, Float b, Float weight) { return a + weight * (b - a); }
Float relu(Float value) { return larger(value, fill(0.0f)); }  // keeps NaN

template <typename Type>
struct Rows {
  using Element = typename Type::Element;

  struct Held {
    float* values;
    int64_t offset;  // of the row in `low`, or -1 where there is none
  };

  const UpsampleAddReLU& call;
  const int64_t floats, pitch;  // of a row, and from one of its pixels to the next
  const bool taller, wider;     // whether an axis is longer than that of `low`: one that keeps its size is copied
  Held upper, lower;
  float* blended;
  float* weight;  // [columns]: of the right one of a column's two source columns
  int32_t* left;  // [columns]: the left one

  Rows(const UpsampleAddReLU& call, Arena& arena)
      : call(call), floats(row_floats(call)), pitch(round_up(call.high.channels, kLanes)),
        taller(call.low.height < call.high.height), wider(call.low.width < call.high.width),
        upper{arena.take<float>(floats), -1}, lower{arena.take<float>(floats), -1},
        blended(arena.take<float>(floats)), weight(arena.take<float>(call.high.width + kLanes)),
        left(arena.take<int32_t>(call.high.width + kLanes)) {}

  void find_sources() const {
    for (int64_t x = 0; x < call.high.width + kLanes; ++x) {
      const auto source = source_of(smaller_of(x, call.high.width - 1), call.low.width, call.high.width);
      left[x] = static_cast<int32_t>(source.low);
      weight[x] = source.weight;
    }
  }

  void read(int64_t offset, Held& to) const {
    if (to.offset == offset) return;
    to.offset = offset;
    const View& low = call.low;
    if (has_pixels(call)) {
      const Row pixels{offset, low.channel_stride, low.column_stride, low.width, low.channels};
      read_row<Type>(low.data, pixels, to.values, pitch);
    } else {
      read_plane(low.dtype, low.data, offset, low.column_stride, low.width, to.values);
      for (int64_t x = low.width; x < floats; ++x) to.values[x] = to.values[low.width - 1];
    }
  }

  // The row of `low` that belongs to row y of the result, in floats.
  const float* blend(int64_t image, int64_t channel, int64_t y) {
    const auto source = source_of(y, call.low.height, call.high.height);
    const int64_t first = offset_of(call.low, image, channel, source.low);
    if (upper.offset != first) std::swap(upper, lower);  // for the next pair, the lower row becomes the upper one
    read(first, upper);
    if (!taller) return upper.values;
    read(offset_of(call.low, image, channel, source.high), lower);
    for (int64_t i = 0; i < floats; i += kLanes) {
      const Float a = load<Float>(upper.values + i), b = load<Float>(lower.values + i);
      store(blended + i, lerp(a, b, fill(source.weight)), kLanes);
    }
    return blended;
  }

  // relu(high + low) of whole vectors of neighbours, then of what is left or strided; low(i) is a vector from i on.
  template <typename Low>
  void finish(const Element* high, int64_t stride, Element* out, int64_t count, Low low) const {
    const int64_t whole = stride == 1 ? count / kLanes * kLanes : 0;
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, Type::narrow(relu(Type::widen(load<typename Type::Vector>(high + i)) + low(i))), kLanes);
    for (int64_t i = whole; i < count; i += kLanes)
      write_some<Type>(out + i, 1, relu(read_some<Type>(high + i * stride, stride, count - i) + low(i)), count - i);
  }

  void write_pixels(const float* row, const Element* high, Element* out) const {
    for (int64_t x = 0; x < call.high.width; ++x) {
      const float* a = row + left[x] * pitch;
      const float* b = left[x] + 1 < call.low.width ? a + pitch : a;
      const auto low = [=, part = fill(weight[x])](int64_t c) {
        const Float value = load<Float>(a + c);
        return wider ? lerp(value, load<Float>(b + c), part) : value;
      };
      Element* to = out + x * call.out.column_stride;
      finish(high + x * call.high.column_stride, call.high.channel_stride, to, call.high.channels, low);
    }
  }

  void write_columns(const float* row, const Element* high, Element* out) const {
    const auto low = [=](int64_t x) {
      const Int index = load<Int>(left + x) - left[x];
      const Float value = permute(load<Float>(row + left[x]), index);
      return wider ? lerp(value, permute(load<Float>(row + left[x] + 1), index), load<Float>(weight + x)) : value;
    };
    finish(high, call.high.column_stride, out, call.high.width, low);
  }
};

// A task is a row of the result: of all channels where these are innermost, else of one.
template <typename Type>
void write_rows(const UpsampleAddReLU& call, Parallel parallel) {
  using Element = typename Type::Element;
  const int64_t tasks = call.high.batch * planes_of(call) * call.high.height;
  const int64_t work = call.high.width * call.high.channels / planes_of(call);
  Arena count{nullptr};
  Rows<Type>(call, count);
  parallel_tasks(parallel, tasks, work, count.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    Rows<Type> rows(call, arena);
    rows.find_sources();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t y = task % call.high.height, plane = task / call.high.height;
      const int64_t image = plane / planes_of(call), channel = plane % planes_of(call);
      const float* row = rows.blend(image, channel, y);
      const Element* from = static_cast<const Element*>(call.high.data) + offset_of(call.high, image, channel, y);
      Element* to = static_cast<Element*>(call.out.data) + offset_of(call.out, image, channel, y);
      if (has_pixels(call)) {
        rows.write_pixels(row, from, to);
      } else {
        rows.write_columns(row, from, to);
      }
    }
  });
}

}  // namespace

void upsample_add_relu_cpu(const UpsampleAddReLU& call, Parallel parallel) {
  dispatch_float(call.high.dtype, [&](auto type) { write_rows<decltype(type)>(call, parallel); });
}

}  // namespace bcmfnet::BCM_ISA
