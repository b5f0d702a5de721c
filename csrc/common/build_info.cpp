// What this library was built with and what it chose, for `bcmfnet env`; read through ctypes, so that it needs no op.
#include "common/isa.h"

#if BCMFNET_WITH_CUDA
#define BCM_CUDA "\"" BCMFNET_CUDA "\""
#else
#define BCM_CUDA "null"
#endif
#define BCM_INFO(isa) "{\"compiler\": \"" __VERSION__ "\", \"cpu\": \"" isa "\", \"cuda\": " BCM_CUDA "}"

extern "C" __attribute__((visibility("default"))) const char* bcmfnet_build_info() {
  switch (bcmfnet::cpu_isa()) {
    case bcmfnet::Isa::kV4: return BCM_INFO("x86-64-v4");
    case bcmfnet::Isa::kV3: return BCM_INFO("x86-64-v3");
    default: return BCM_INFO("plain");
  }
}
