// The labels of each pixel, as the kernels of the rooms read them.
#include <climits>

#include "bcl/terms_cuda.h"

namespace bcmfnet {
namespace {

template <typename Label>
using ValueOf = std::conditional_t<(sizeof(Label) < 4), int, int64_t>;

// A label as label + 1, or 0 for one that does not count.
template <typename Value>
struct Codes {
  Value ignore;
  std::make_unsigned_t<Value> classes;

  // A short label equals no ignore_index that an int does not hold.
  __device__ explicit Codes(const Bcl& call)
      : ignore(static_cast<Value>(
            static_cast<Value>(call.options.ignore_index) == call.options.ignore_index ? call.options.ignore_index : INT_MIN)),
        classes(static_cast<std::make_unsigned_t<Value>>(classes_of(call))) {}
  __device__ unsigned operator()(Value label) const {
    const bool known = label != ignore && static_cast<std::make_unsigned_t<Value>>(label) < classes;
    return known ? static_cast<unsigned>(label) + 1 : 0;
  }
};

// The same of four labels that are bytes, of up to kMostClasses, one of which may be ignored (kIgnoresClass).
template <bool kIgnoresClass>
struct LabelBytes {
  static constexpr uint32_t kEach = 0x01010101, kHigh = 0x80 * kEach, kLow = ~kHigh;

  const uint32_t ignored, beyond;  // in each byte: ignore_index, and what takes the number of classes to the highest bit
  const bool ignores;

  __device__ explicit LabelBytes(const Bcl& call)
      : ignored(static_cast<uint8_t>(call.options.ignore_index) * kEach),
        beyond((0x80 - static_cast<uint32_t>(call.logits.channels)) * kEach),
        ignores(call.options.ignore_index == static_cast<uint8_t>(call.options.ignore_index)) {}
  // The highest bit of each that is not ignored.
  __device__ uint32_t valid(uint32_t labels) const {
    const uint32_t differs = labels ^ ignored;
    return ignores ? (((differs & kLow) + kLow) | differs) & kHigh : kHigh;
  }
  // All bits of each that counts.
  __device__ uint32_t known(uint32_t labels) const {
    uint32_t high = ~(((labels & kLow) + beyond) | labels) & kHigh;
    if (kIgnoresClass) high &= valid(labels);
    return (high - (high >> 7)) | high;
  }
  __device__ static uint32_t codes(uint32_t labels, uint32_t known) { return ((labels & kLow) + kEach) & known; }
};

// The rows and columns that flips read, [kTileRows] and [kTileColumns], of a whole block; and whether a call needs them.
struct Flips {
  bool rows, columns;
};
__device__ Flips flips_of(const Bcl& call, const Tile& tile, int* other_rows, int* other_columns) {
  const BclOptions& options = call.options;
  const Target target{call, tile.image};
  if (threadIdx.x < kTileRows) other_rows[threadIdx.x] = target.flip(0, tile.top + static_cast<int>(threadIdx.x));
  const int column = tile.left + static_cast<int>(threadIdx.x);
  other_columns[threadIdx.x] = column < call.target.width ? target.flip(1, column) : 0;
  __syncthreads();
  return {selects(call) && (options.score[1] != 0 || options.terms[1] != 0),
          selects(call) && (options.score[2] != 0 || options.terms[2] != 0)};
}

// The three labels of each pixel, in one word, of labels that are bytes or longer integers. What takes divisions is done
// once for a block: the rows and columns that flips read. With kWeighs pixels have weights. With kPacks the lane's labels
// of a row are loaded at once.
template <bool kWeighs, bool kPacks, typename Label>
__global__ void __launch_bounds__(kThreads, kWeighs ? 2 : sizeof(Label) > 2 ? 3 : 4) labels_kernel(
    const Bcl call, const Scratch scratch) {
  using Value = ValueOf<Label>;
  __shared__ int other_rows[kTileRows];
  __shared__ __align__(16) int other_columns[kTileColumns];
  const Tile tile(call);
  const View& view = call.target;
  const TargetOf<kWeighs> target{call, tile.image};
  const BclOptions& options = call.options;
  const auto [needs_rows, needs_columns] = flips_of(call, tile, other_rows, other_columns);
  const Codes<Value> code_of(call);
  const Value ignore = code_of.ignore;
  const Label* const labels = static_cast<const Label*>(view.data) + offset_of(view, tile.image, 0, 0);
  const auto weight_of = [&](int y, int x) { return kWeighs ? target.weight(y, x) : 1.0f; };
  const auto read_one = [&](int y, int x) -> Value {
    if (kWeighs && weight_of(y, x) == 0) return ignore;
    return labels[y * view.row_stride + x * view.column_stride];
  };
  const auto read = [&](int y, Value (&values)[kPacked]) {
    if constexpr (kPacks) {
      const Label* const from = labels + y * view.row_stride + tile.x;
      if constexpr (sizeof(Label) == 1) {
        const auto words = Pack<uint32_t, kPacked / 4>::load(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
        for (int i = 0; i < kPacked; ++i) values[i] = __byte_perm(words.value[i / 4], 0, 0x4440 + i % 4);
      } else {
        const auto loaded = Pack<Label, kPacked>::load(from);
#pragma unroll
        for (int i = 0; i < kPacked; ++i) values[i] = loaded.value[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPacked; ++i) values[i] = i < tile.columns ? read_one(y, tile.x + i) : ignore;
    }
  };
  int others[kPacked];
#pragma unroll
  for (int i = 0; i < kPacked; ++i) others[i] = other_columns[tile.x - tile.left + i];
  const bool weighs_classes = call.class_weight != nullptr || options.binary;
  float weight = 0, labelled = 0, distilled = 0;
  int valid = 0, known = 0;
  for (int y = tile.begin; tile.columns > 0 && y < tile.end; ++y) {
    Value own[kPacked], flipped[kPacked];
    unsigned codes[kPacked], rows[kPacked] = {}, columns[kPacked] = {};
    read(y, own);
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
      codes[i] = code_of(own[i]);
      valid += own[i] != ignore, known += codes[i] != 0;
      if constexpr (kWeighs) {
        const float u = i < tile.columns ? weight_of(y, tile.x + i) : 0.0f;
        labelled += own[i] != ignore ? u : 0.0f, distilled += own[i] != ignore || options.everywhere ? u : 0.0f;
        if (codes[i] != 0) weight += u * weight_of_class(call, static_cast<int>(codes[i]) - 1);
      }
    }
    if (!kWeighs && weighs_classes) {
#pragma unroll
      for (int i = 0; i < kPacked; ++i)
        weight += codes[i] != 0 ? weight_of_class(call, static_cast<int>(codes[i]) - 1) : 0.0f;
    }
    if (needs_rows) {
      read(other_rows[y - tile.top], flipped);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) rows[i] = codes[i] != 0 ? code_of(flipped[i]) : 0;
    }
    if (needs_columns) {
      const Label* const row = labels + y * view.row_stride;
#pragma unroll
      for (int i = 0; i < kPacked; ++i) flipped[i] = kPacks ? row[others[i]] : read_one(y, others[i]);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) columns[i] = codes[i] != 0 ? code_of(flipped[i]) : 0;
    }
    const int64_t at = tile.row(call, y) * scratch.score_pitch + tile.x;
    Scores narrow{};
    if (is_wide(call)) {
      Pack<uint64_t, kPacked> wide;
#pragma unroll
      for (int i = 0; i < kPacked; ++i) wide.value[i] = Wide::packed(codes[i], rows[i], columns[i]);
      wide.store_to(scratch.labels + at);
    } else {
#pragma unroll
      for (int i = 0; i < kPacked; ++i) narrow.value[i] = Narrow::packed(codes[i], rows[i], columns[i]);
    }
    if (scratch.score) narrow.store_to(scratch.score + at);
  }
  if (!kWeighs && !weighs_classes) weight = static_cast<float>(known);
  write_labelled(weight, valid, valid != known ? kWrong : 0, scratch.labelled + block_number());
  if constexpr (kWeighs) write_terms({labelled, distilled, 0, 0, 0}, scratch.labelled_terms + block_number());
}

// The same of labels that are bytes, four at a time, of up to kMostClasses.
template <bool kIgnoresClass>
__global__ void __launch_bounds__(kThreads, 4) label_bytes_kernel(const Bcl call, const Scratch scratch) {
  constexpr int kWords = kPacked / 4;
  using Words = Pack<uint32_t, kWords>;
  using Bytes = LabelBytes<kIgnoresClass>;
  __shared__ int other_rows[kTileRows];
  __shared__ __align__(16) int other_columns[kTileColumns];
  const Tile tile(call);
  const auto [needs_rows, needs_columns] = flips_of(call, tile, other_rows, other_columns);
  const View& view = call.target;
  const uint8_t* const labels = static_cast<const uint8_t*>(view.data) + offset_of(view, tile.image, 0, 0);
  const Bytes bytes(call);
  int others[kPacked];
#pragma unroll
  for (int i = 0; i < kPacked; ++i) others[i] = other_columns[tile.x - tile.left + i];
  float weight = 0;
  int valid = 0, known = 0;
  for (int y = tile.begin; tile.columns > 0 && y < tile.end; ++y) {
    const uint8_t* const row = labels + y * view.row_stride;
    const auto read = [&](const uint8_t* from) { return Words::load(reinterpret_cast<const uint32_t*>(from + tile.x)); };
    const Words own = read(row), of_rows = needs_rows ? read(labels + other_rows[y - tile.top] * view.row_stride) : Words{};
    Pack<uint32_t, kPacked / 2> narrow;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t mask = bytes.known(own.value[i]), codes = Bytes::codes(own.value[i], mask);
      valid += __popc(bytes.valid(own.value[i])), known += __popc(mask & Bytes::kHigh);
      const auto flipped = [&](uint32_t other) { return Bytes::codes(other, bytes.known(other)) & mask; };
      const uint32_t rows = needs_rows ? flipped(of_rows.value[i]) : 0;
      uint32_t columns = 0;
      if (needs_columns) {
        const auto read_one = [&](int at) -> uint32_t { return row[others[4 * i + at]]; };
        columns = flipped(read_one(0) | read_one(1) << 8 | read_one(2) << 16 | read_one(3) << 24);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto pair = [&](uint32_t word) { return __byte_perm(word, 0, half ? 0x4342 : 0x4140); };
        narrow.value[2 * i + half] = pair(codes) + pair(rows) * 32 + pair(columns) * 1024;
      }
      if (call.class_weight) {
#pragma unroll
        for (int shift = 0; shift < 32; shift += 8) {
          const int code = codes >> shift & 0xff;
          weight += code != 0 ? class_weight_of(call, code - 1) : 0.0f;
        }
      }
    }
    narrow.store_to(reinterpret_cast<uint32_t*>(scratch.score + tile.row(call, y) * scratch.score_pitch + tile.x));
  }
  if (!call.class_weight) weight = static_cast<float>(known);
  write_labelled(weight, valid, valid != known ? kWrong : 0, scratch.labelled + block_number());
}

// The label of each pixel alone, as a byte of up to kMostClasses, and once for all of them what takes divisions: the rows
// and columns that flips read.
template <typename Label, bool kPacks, bool kIgnoresClass>
__global__ void __launch_bounds__(kThreads, 4) codes_kernel(const Bcl call, const Scratch scratch) {
  using Value = ValueOf<Label>;
  using Words = Pack<uint32_t, kPacked / 4>;
  using Bytes = LabelBytes<kIgnoresClass>;
  const Tile tile(call);
  const View& view = call.target;
  if (tile.image == 0 && selects(call)) {
    const Target target{call, 0};
    const int row = tile.top + static_cast<int>(threadIdx.x), column = tile.left + static_cast<int>(threadIdx.x);
    if (tile.left == 0 && threadIdx.x < kTileRows && row < view.height)
      scratch.other_rows[row] = (target.flip(0, row) - row) * scratch.score_pitch;
    if (tile.top == 0 && column < view.width) scratch.other_columns[column] = target.flip(1, column) - column;
  }
  const Label* const labels = static_cast<const Label*>(view.data) + offset_of(view, tile.image, 0, 0);
  const Codes<Value> code_of(call);
  const Bytes bytes(call);
  float weight = 0;
  int valid = 0, known = 0;
  for (int y = tile.begin; tile.columns > 0 && y < tile.end; ++y) {
    const Label* const row = labels + y * view.row_stride;
    const int64_t at = tile.row(call, y) * scratch.score_pitch + tile.x;
    Words words{};
    if constexpr (sizeof(Label) == 1 && kPacks) {
      words = Words::load(reinterpret_cast<const uint32_t*>(row + tile.x));
#pragma unroll
      for (uint32_t& word : words.value) {
        const uint32_t mask = bytes.known(word);
        valid += __popc(bytes.valid(word)), known += __popc(mask & Bytes::kHigh);
        word = Bytes::codes(word, mask);
      }
    } else {
      Pack<Label, kPacked> loaded;
      if constexpr (kPacks) loaded = Pack<Label, kPacked>::load(row + tile.x);
#pragma unroll
      for (int i = 0; i < kPacked; ++i) {
        if (i >= tile.columns) {  // of a pixel beyond the image no other kernel writes the score
          if (scratch.score) scratch.score[at + i] = 0;
          continue;
        }
        const Value label = kPacks ? loaded.value[i] : row[(tile.x + i) * view.column_stride];
        const unsigned code = code_of(label);
        valid += label != code_of.ignore, known += code != 0;
        words.value[i / 4] |= code << i % 4 * 8;
      }
    }
    if (call.class_weight) {
#pragma unroll
      for (int i = 0; i < kPacked; ++i) {
        const int code = words.value[i / 4] >> i % 4 * 8 & 0xff;
        weight += code != 0 ? class_weight_of(call, code - 1) : 0.0f;
      }
    }
    words.store_to(reinterpret_cast<uint32_t*>(scratch.codes + at));
  }
  if (!call.class_weight) weight = static_cast<float>(known);
  write_labelled(weight, valid, valid != known ? kWrong : 0, scratch.labelled + block_number());
}

template <typename Label>
int label(const Bcl& call, const Scratch& scratch, void* stream) {
  const View& view = call.target;
  const bool packs = view.column_stride == 1 && view.width % kPacked == 0 && view.row_stride % kPacked == 0 &&
                     view.batch_stride % kPacked == 0 && reinterpret_cast<uintptr_t>(view.data) % kPackBytes == 0;
  const bool ignores_class = call.options.ignore_index >= 0 && call.options.ignore_index < call.logits.channels;
  const bool bytes = sizeof(Label) == 1 && packs && !is_wide(call) && !call.options.binary;
  auto kernel = call.pixel_weight.data ? labels_kernel<true, false, Label>
                : bytes                ? ignores_class ? label_bytes_kernel<true> : label_bytes_kernel<false>
                : packs                ? labels_kernel<false, true, Label>
                                       : labels_kernel<false, false, Label>;
  if (codes_labels(call)) {
    kernel = !packs                               ? codes_kernel<Label, false, false>
             : sizeof(Label) == 1 && ignores_class ? codes_kernel<Label, true, sizeof(Label) == 1>
                                                  : codes_kernel<Label, true, false>;
  }
  BCM_LAUNCH(kernel, tile_grid(call), kThreads, 0, stream, call, scratch);
  return cudaGetLastError();
}

}  // namespace

int launch_labels(const Bcl& call, const Scratch& scratch, void* stream) {
  switch (call.target.dtype) {
    case DType::kUInt8: return label<uint8_t>(call, scratch, stream);
    case DType::kInt16: return label<int16_t>(call, scratch, stream);
    case DType::kInt32: return label<int32_t>(call, scratch, stream);
    default: return label<int64_t>(call, scratch, stream);
  }
}

}  // namespace bcmfnet
