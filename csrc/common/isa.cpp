#include "common/isa.h"

#include <cstdlib>
#include <cstring>

#include "common/integers.h"

namespace bcmfnet {

// The matrix unit, and vectors that round to what it multiplies.
#if defined(BCM_X86_ISAS)
static bool supports_amx() { return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16"); }
#endif

static Isa detect() {
#if defined(BCM_X86_ISAS)
  const char* named = std::getenv("BCMFNET_CPU_LEVEL");
  const auto most = [&](Isa isa, const char* name) { return named && std::strcmp(named, name) == 0 ? isa : Isa::kAmx; };
  const Isa limit = smaller_of(smaller_of(most(Isa::kPlain, "plain"), most(Isa::kV3, "v3")), most(Isa::kV4, "v4"));
  if (limit >= Isa::kV4 && __builtin_cpu_supports("x86-64-v4"))
    return limit == Isa::kAmx && supports_amx() ? Isa::kAmx : Isa::kV4;
  if (limit >= Isa::kV3 && __builtin_cpu_supports("x86-64-v3")) return Isa::kV3;
#endif
  return Isa::kPlain;
}

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace bcmfnet
