#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace bcmfnet {

static Isa detect() {
#if defined(__x86_64__)
  const char* named = std::getenv("BCMFNET_CPU_LEVEL");
  const bool lower = named != nullptr && std::strcmp(named, "v4") != 0;
  const bool lowest = lower && std::strcmp(named, "plain") == 0;
  if (!lower && __builtin_cpu_supports("x86-64-v4")) return Isa::kV4;
  if (!lowest && __builtin_cpu_supports("x86-64-v3")) return Isa::kV3;
#endif
  return Isa::kPlain;
}

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace bcmfnet
