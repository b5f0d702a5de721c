// bfloat16 products with float32 sums on AMX, the matrix unit of some x86 processors: on one with 1.6 T multiply-adds a
// second, against 0.11 T of float32 vectors (and 0.05 T of AVX512-BF16, which is therefore not used).
#pragma once

#include "common/amx.h"
#include "lmfm/gemm.h"

#if defined(BCM_AMX)

namespace bcmfnet::BCM_ISA {

// Two by two tiles of c stay in the unit; activations are rounded to bfloat16.
struct AmxTiles {
  using Value = uint16_t;
  static constexpr int kRows = 32, kColumns = 32;
  static constexpr int kTile = 16;    // rows of a tile, and 32-bit columns
  static constexpr int kDepth = 32;   // of one step; beyond the depth activations and weights are zero
  static constexpr int kChunk = 640;  // of the depth, over all pieces
  static constexpr int kPackedFloats = kChunk / 2 * kColumns;

  static void begin() {
    AmxShapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.set(tile, kTile, 64);
    shapes.load();
  }

  __attribute__((target("amx-tile"))) static void end() { _tile_release(); }

  static void put(Value* to, Float value) { store(to, BFloat16::narrow(value), kLanes); }

  // Pairs of rows become one, whose 32-bit elements hold those of both.
  static void pack(const Gemm& of, int64_t row, int64_t depth, int64_t column, float* to) {
    const uint16_t* weights = static_cast<const uint16_t*>(of.weights) + row * of.columns + column;
    const int64_t columns = of.columns - column;
    for (int64_t k = 0; k < round_up(depth, kDepth); k += 2, to += kColumns)
      for (int64_t c = 0; c < kColumns; c += kLanes) {
        const uint16_t* at = weights + (k < depth ? k * of.columns + c : 0);
        const Int low = bits_of(read_some<BFloat16>(at, 1, k < depth ? columns - c : 0));
        const Int high = bits_of(read_some<BFloat16>(at + of.columns, 1, k + 1 < depth ? columns - c : 0));
        store(to + c, high | (low >> 16 & 0xffff), kLanes);
      }
  }

  // c [kRows, kColumns] = or += rows [row, row + kRows) by packed weights.
  __attribute__((target("amx-tile,amx-bf16"))) static void multiply(
      const Piece* pieces, int count, int64_t row, int64_t pitch, const float* b, float* c, int64_t c_pitch,
      bool adds) {
    const int64_t a_bytes = 2 * pitch, b_bytes = 4 * kColumns, c_bytes = 4 * c_pitch;
    float* const below = c + kTile * c_pitch;
    asm volatile("" ::: "memory");
    if (adds) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + kTile, c_bytes);
      _tile_loadd(2, below, c_bytes);
      _tile_loadd(3, below + kTile, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int piece = 0; piece < count; ++piece) {
      const Value* a = static_cast<const Value*>(pieces[piece].a) + row * pitch;
      for (int64_t k = 0; k < pieces[piece].depth; k += kDepth, b += kDepth / 2 * kColumns) {
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(5, a + kTile * pitch + k, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_loadd(7, b + kTile, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + kTile, c_bytes);
    _tile_stored(2, below, c_bytes);
    _tile_stored(3, below + kTile, c_bytes);
    asm volatile("" ::: "memory");
  }
};

}  // namespace bcmfnet::BCM_ISA

#endif
