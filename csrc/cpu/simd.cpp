// The level of this process: the best that the processor has, or the one that MPG_CPU_CAPABILITY
// names. With it tests run every level on one machine.
#include "simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mpg::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};  // as the levels are numbered

Level best_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return Level::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::kAvx2;
#endif
  return Level::kPortable;
}

Level chosen_level() {
  const Level best = best_level();
  const char* variable = std::getenv("MPG_CPU_CAPABILITY");
  if (variable == nullptr || *variable == 0) return best;
  std::string available;
  for (int level = 0; level <= int(best); ++level) {
    if (kNames[level] == std::string(variable)) return Level(level);
    available += std::string(level > 0 ? ", " : "") + kNames[level];
  }
  throw std::invalid_argument("MPG_CPU_CAPABILITY must name a level of this processor (" +
                              available + "), got " + variable);
}

}  // namespace

Level level() {
  static const Level level = chosen_level();
  return level;
}

const char* capability() { return kNames[int(level())]; }

}  // namespace mpg::cpu
