// Neighbouring elements that one instruction moves.
#pragma once

#include "common/view.h"

namespace bcmfnet {

constexpr int kPackBytes = 16;  // of the largest load

// Whether the channels of a map can be read and written so many at a time, by as many bytes.
inline bool has_packs(const View& map, int64_t count) {
  return map.channel_stride == 1 && reinterpret_cast<uintptr_t>(map.data) % kPackBytes == 0 &&
         map.batch_stride % count == 0 && map.row_stride % count == 0 && map.column_stride % count == 0;
}

// Elements that are loaded and stored at once, or by 16 bytes where they are more.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T value[kCount];

  __device__ static Pack load(const T* from) { return *reinterpret_cast<const Pack*>(from); }
  __device__ void store_to(T* to) const {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Pack) == 16) {  // As a Pack, the compiler makes four stores of 4 bytes of it.
      __stcg(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(this));
      return;
    }
#endif
    *reinterpret_cast<Pack*>(to) = *this;
  }
};

}  // namespace bcmfnet
