// Neighbouring elements that one instruction moves.
#pragma once

namespace bcmfnet {

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
