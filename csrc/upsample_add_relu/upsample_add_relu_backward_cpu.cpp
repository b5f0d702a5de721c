// The rows of the result between two source rows at a time, each read once: what they owe the lower source row is kept
// for the next rows, which belong to it too. Of a range's first rows it is computed again, so that the sums are the
// same however the rows are divided.
#include <utility>

#include "common/arena.h"
#include "common/rows.h"
#include "common/simd.h"
#include "upsample_add_relu/upsample_add_relu_cpu.h"

namespace bcmfnet::BCM_ISA {
namespace {

using Call = UpsampleAddReLUBackward;

bool has_pixels(const Call& call) { return is_channels_last(call) && call.out.channels > 1; }

int64_t planes_of(const Call& call) { return has_pixels(call) ? 1 : call.out.channels; }

// Floats of a row of `low`: pixels of whole vectors, or columns.
int64_t row_floats(const Call& call) {
  return round_up(call.low.width * (has_pixels(call) ? round_up(call.low.channels, kLanes) : 1), kLanes);
}

// A row of a map, from its first element in memory on.
template <typename T>
T* row_at(const View& map, int64_t image, int64_t channel, int64_t row) {
  return static_cast<T*>(map.data) + offset_of(map, image, channel, row);
}

void add(Float value, float* to) { store(to, load<Float>(to) + value, kLanes); }

template <typename Type>
struct Sums {
  using Element = typename Type::Element;

  const Call& call;
  const int64_t floats, pitch;  // of a row of `low`, and from one of its pixels to the next
  const int64_t wide;           // floats of a row of the result, as columns
  float *upper, *lower;         // [floats]: what the source row, and the next one, have so far
  float *upper_wide, *lower_wide;  // [wide]: the same before columns are brought together
  Cell* cells;                     // [low.width + 1]: columns of the result

  Sums(const Call& call, Arena& arena)
      : call(call), floats(row_floats(call)), pitch(round_up(call.low.channels, kLanes)),
        wide(has_pixels(call) ? 0 : round_up(call.out.width, kLanes)), upper(arena.take<float>(floats)),
        lower(arena.take<float>(floats)), upper_wide(arena.take<float>(wide)), lower_wide(arena.take<float>(wide)),
        cells(arena.take<Cell>(call.low.width + 1)) {}

  void find_cells() const {
    for (int64_t x = 0; x <= call.low.width; ++x) cells[x] = cell_of(x, call.low.width, call.out.width);
  }

  // The gradient of whole vectors, and of the elements after them, where the result is positive or NaN.
  static Float masked(const Element* grad, int64_t stride, const Element* out, int64_t out_stride, int64_t count) {
    const Float value = read_some<Type>(grad, stride, count);
    return read_some<Type>(out, out_stride, count) <= 0.0f ? fill(0.0f) : value;
  }

  // Rows of the result whose upper source row is `row`; `writes` says whether the gradient of `high` is wanted.
  void take(int64_t image, int64_t channel, int64_t row, bool writes) {
    std::swap(upper, lower);
    for (int64_t i = 0; i < floats; i += kLanes) store(lower + i, fill(0.0f), kLanes);
    for (int64_t i = 0; i < wide; i += kLanes)
      store(upper_wide + i, fill(0.0f), kLanes), store(lower_wide + i, fill(0.0f), kLanes);
    const Cell rows = cell_of(row, call.low.height, call.out.height);
    const int64_t end = first_output(row + 1, call.low.height, call.out.height);
    for (int64_t y = rows.begin; y < end; ++y) {
      const float part = upper_weight(rows, y - rows.begin);
      const auto* grad = row_at<const Element>(call.grad, image, channel, y);
      const auto* out = row_at<const Element>(call.out, image, channel, y);
      Element* high = writes ? row_at<Element>(call.high, image, channel, y) : nullptr;
      if (has_pixels(call)) {
        take_pixels(grad, out, high, part);
      } else {
        take_columns(grad, out, high, part);
      }
    }
    if (wide) {
      join_columns(upper_wide, upper);
      join_columns(lower_wide, lower);
    }
  }

  // One row of the result, of which `part` belongs to the lower source row.
  void take_pixels(const Element* grad, const Element* out, Element* high, float part) const {
    for (int64_t x = 0; x < call.low.width; ++x) {
      const Cell& cell = cells[x];
      const int64_t end = cells[x + 1].begin;
      for (int64_t c = 0; c < call.low.channels; c += kLanes) {
        const int64_t count = call.low.channels - c;
        Float left = fill(0.0f), right = fill(0.0f);
        for (int64_t i = cell.begin; i < end; ++i) {
          const Float value = masked(
              grad + i * call.grad.column_stride + c * call.grad.channel_stride, call.grad.channel_stride,
              out + i * call.out.column_stride + c, 1, count);
          if (high) write_some<Type>(high + i * call.high.column_stride + c, 1, value, count);
          const float weight = upper_weight(cell, i - cell.begin);
          left += (1 - weight) * value;
          right += weight * value;
        }
        add_pixel(x * pitch + c, left, part);
        if (x + 1 < call.low.width) add_pixel((x + 1) * pitch + c, right, part);
      }
    }
  }

  void add_pixel(int64_t at, Float value, float part) const {
    add((1 - part) * value, upper + at);
    if (part != 0) add(part * value, lower + at);
  }

  void take_columns(const Element* grad, const Element* out, Element* high, float part) const {
    for (int64_t x = 0; x < call.out.width; x += kLanes) {
      const int64_t count = call.out.width - x;
      const Float value = masked(grad + x * call.grad.column_stride, call.grad.column_stride, out + x, 1, count);
      if (high) write_some<Type>(high + x, 1, value, count);
      add((1 - part) * value, upper_wide + x);
      if (part != 0) add(part * value, lower_wide + x);
    }
  }

  void join_columns(const float* from, float* to) const {
    for (int64_t x = 0; x < call.low.width; ++x) {
      float left = 0, right = 0;
      for (int64_t i = cells[x].begin; i < cells[x + 1].begin; ++i) {
        const float weight = upper_weight(cells[x], i - cells[x].begin);
        left += (1 - weight) * from[i];
        right += weight * from[i];
      }
      to[x] += left;
      if (x + 1 < call.low.width) to[x + 1] += right;
    }
  }

  void write(int64_t image, int64_t channel, int64_t row) const {
    if (has_pixels(call)) {
      write_row<Type>(call.low.data, row_of(call.low, image, 0, row, call.low.channels), upper, pitch);
    } else {
      write_plane(call.low.dtype, call.low.data, offset_of(call.low, image, channel, row), call.low.column_stride,
                  call.low.width, 1, upper);
    }
  }
};

// A task is a row of `low`: of all channels where these are innermost, else of one.
template <typename Type>
void write_rows(const Call& call, Parallel parallel) {
  const int64_t tasks = call.low.batch * planes_of(call) * call.low.height;
  const int64_t work = call.out.width * call.out.channels / planes_of(call) * call.out.height / call.low.height;
  Arena count{nullptr};
  Sums<Type>(call, count);
  parallel_tasks(parallel, tasks, work, count.bytes, [&](int64_t begin, int64_t end, void* scratch) {
    Arena arena{static_cast<char*>(scratch)};
    Sums<Type> sums(call, arena);
    sums.find_cells();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % call.low.height, plane = task / call.low.height;
      const int64_t image = plane / planes_of(call), channel = plane % planes_of(call);
      if (row == 0) {
        for (int64_t i = 0; i < sums.floats; i += kLanes) store(sums.lower + i, fill(0.0f), kLanes);
      } else if (task == begin) {
        sums.take(image, channel, row - 1, false);
      }
      sums.take(image, channel, row, true);
      sums.write(image, channel, row);
    }
  });
}

}  // namespace

void upsample_add_relu_backward_cpu(const Call& call, Parallel parallel) {
  dispatch_float(call.out.dtype, [&](auto type) { write_rows<decltype(type)>(call, parallel); });
}

}  // namespace bcmfnet::BCM_ISA
