#include "common/levels.h"

#include <cstdlib>
#include <cstring>

namespace bcmfnet {

static Level detect() {
#if defined(__x86_64__)
  const char* named = std::getenv("BCMFNET_CPU_LEVEL");
  const bool lower = named != nullptr && std::strcmp(named, "v4") != 0;
  const bool lowest = lower && std::strcmp(named, "plain") == 0;
  if (!lower && __builtin_cpu_supports("x86-64-v4")) return Level::kV4;
  if (!lowest && __builtin_cpu_supports("x86-64-v3")) return Level::kV3;
#endif
  return Level::kPlain;
}

Level cpu_level() {
  static const Level level = detect();
  return level;
}

}  // namespace bcmfnet
