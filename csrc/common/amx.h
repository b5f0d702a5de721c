// AMX, the matrix unit of some x86 processors: who may use it, and the shapes of its tiles.
#pragma once

#include "common/isa.h"

#if defined(__AVX512F__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define BCM_AMX 1

#include <cstdint>

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace bcmfnet::BCM_ISA {

// Whether the processor has the unit and the system lets this process use it.
static inline bool has_amx() {
  static const bool has = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return cpu_isa() == Isa::kAmx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}

// Shapes of the eight tiles: rows, and bytes of each; _tile_release gives the unit back.
struct AmxShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int count, int bytes) {
    rows[tile] = static_cast<uint8_t>(count), row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
  __attribute__((target("amx-tile"))) void load() const {
    asm volatile("" ::"r"(this) : "memory");  // the intrinsics do not tell the compiler what they read and write
    _tile_loadconfig(this);
  }
};

}  // namespace bcmfnet::BCM_ISA

#endif
