// Matrix products (GEMM): rows of activations, each an aligned row of whole blocks of channels, by weights [in, out].
// Columns are taken a panel at a time, and of its weights a chunk that stays in the first cache: it is packed once, and
// multiplied by many panels of rows.
#pragma once

#include <cstdint>

#include "common/rows.h"

namespace bcmfnet::BCM_ISA {

constexpr int kMaxTaps = 9;

// c [rows, columns] = or += the sum over taps t of rows [shift[t], shift[t] + rows) of `a`, by weights[t].
struct Gemm {
  const void* a;  // activations, `pitch` apart from row to row
  int64_t pitch;
  int32_t taps;
  int64_t shift[kMaxTaps];
  int64_t depth;        // elements of a row of `a` that count
  const void* weights;  // [taps, depth, columns]
  DType type;           // of the weights
  int64_t rows, columns;
  float* c;  // `c_pitch` apart from row to row; there is room for whole panels of rows and of columns
  int64_t c_pitch;
  bool adds;
};

// What a panel of rows is multiplied by at once: all or some of the elements of one tap.
struct Piece {
  const void* a;  // of the first row
  int64_t depth;
};

// float32 arithmetic on any processor. A panel of c stays in registers.
struct FloatTiles {
  using Value = float;
  // A panel takes 24 of 32 vector registers, or 12 of 16; with 9 rows in place of 12 it is 7 % slower.
  static constexpr int kRows = kLanes == 16 ? 12 : 6;
  static constexpr int kColumns = 2 * kLanes;
  static constexpr int kDepth = 1;    // of a step
  static constexpr int kChunk = 256;  // of the depth, over all pieces: 128 to 384 differ by less than 3 %
  static constexpr int kPackedFloats = kChunk * kColumns;

  static void begin() {}
  static void end() {}
  static void put(Value* to, Float value) { store(to, value, kLanes); }

  // Rows [row, row + depth) of the weights, and the columns of a panel.
  static void pack(const Gemm& of, int64_t row, int64_t depth, int64_t column, float* to) {
    const int64_t rest = of.columns - column;
    const Row weights{row * of.columns + column, 1, of.columns, depth, rest < kColumns ? rest : kColumns};
    if (rest < kColumns) std::memset(to, 0, sizeof(float) * depth * kColumns);
    read_row(of.type, of.weights, weights, to, kColumns);
  }

  // c [kRows, kColumns] = or += rows [row, row + kRows) by packed weights. Rows are addressed from every third of them:
  // x86 adds a pitch once or twice by itself, and has not registers enough for a pointer to each.
  static void multiply(
      const Piece* pieces, int count, int64_t row, int64_t pitch, const float* b, float* c, int64_t c_pitch,
      bool adds) {
    Float left[kRows] = {}, right[kRows] = {};
    for (int piece = 0; piece < count; ++piece) {
      const float* third[kRows / 3];
      for (int i = 0; i < kRows / 3; ++i)
        third[i] = static_cast<const float*>(pieces[piece].a) + (row + 3 * i) * pitch;
      for (int64_t k = 0; k < pieces[piece].depth; ++k, b += kColumns) {
        const Float first = load<Float>(b), second = load<Float>(b + kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const float value = third[r / 3][r % 3 * pitch];
          left[r] += value * first;
          right[r] += value * second;
        }
#pragma GCC unroll 4
        for (int i = 0; i < kRows / 3; ++i) ++third[i];
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r, c += c_pitch) {
      store(c, adds ? load<Float>(c) + left[r] : left[r], kLanes);
      store(c + kLanes, adds ? load<Float>(c + kLanes) + right[r] : right[r], kLanes);
    }
  }
};

template <typename Tiles>
static int64_t panels_of(const Gemm& gemm) {
  return ceil_div(gemm.rows, Tiles::kRows);
}

// Panels of rows [begin, end) of one product; `packed` holds kPackedFloats.
template <typename Tiles>
static void multiply_panels(const Gemm& of, int64_t begin, int64_t end, float* packed) {
  for (int64_t column = 0; column < of.columns; column += Tiles::kColumns) {
    bool adds = of.adds;
    int32_t tap = 0;
    for (int64_t k = 0; tap < of.taps; adds = true) {
      Piece pieces[kMaxTaps];
      int count = 0;
      for (int64_t filled = 0; tap < of.taps;) {
        const int64_t depth = of.depth - k < Tiles::kChunk ? of.depth - k : Tiles::kChunk;
        if (filled + round_up(depth, Tiles::kDepth) > Tiles::kChunk) break;
        pieces[count++] = {static_cast<const typename Tiles::Value*>(of.a) + of.shift[tap] * of.pitch + k, depth};
        Tiles::pack(of, tap * of.depth + k, depth, column, packed + filled * Tiles::kPackedFloats / Tiles::kChunk);
        filled += round_up(depth, Tiles::kDepth);
        k += depth;
        if (k == of.depth) k = 0, ++tap;
      }
      for (int64_t row = begin * Tiles::kRows; row < end * Tiles::kRows; row += Tiles::kRows)
        Tiles::multiply(pieces, count, row, of.pitch, packed, of.c + row * of.c_pitch + column, of.c_pitch, adds);
    }
  }
}

// Panels [begin, end) of those of `count` products gemm(i), one after the other.
template <typename Tiles, typename Gemms>
static void multiply_all(const Gemms& gemm, int64_t count, int64_t begin, int64_t end, float* packed) {
  constexpr int64_t kPanels = 576 / Tiles::kRows;  // The activations of so many panels stay in the second cache.
  Tiles::begin();
  int64_t first = 0;
  for (int64_t i = 0; i < count && first < end; ++i) {
    const Gemm of = gemm(i);
    const int64_t panels = panels_of<Tiles>(of), last = end - first < panels ? end - first : panels;
    for (int64_t panel = begin > first ? begin - first : 0; panel < last; panel += kPanels)
      multiply_panels<Tiles>(of, panel, panel + kPanels < last ? panel + kPanels : last, packed);
    first += panels;
  }
  Tiles::end();
}

}  // namespace bcmfnet::BCM_ISA
