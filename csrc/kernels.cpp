// One source for every instruction set, and the choice among them at run time.

#include "kernels.h"

#include <cstdlib>
#include <cstring>

#define HAL_ISA baseline  // SSE2 on x86-64, NEON on arm64
#define HAL_TARGET
#define HAL_BYTES 16
#include "kernels_impl.h"

#if defined(__x86_64__)
#define HAL_ISA avx2
#define HAL_TARGET __attribute__((target("avx2,fma")))
#define HAL_BYTES 32
#include "kernels_impl.h"

#define HAL_ISA avx512
#define HAL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define HAL_BYTES 64
#include "kernels_impl.h"
#endif

namespace hal {

namespace {

enum class Isa { baseline, avx2, avx512 };

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const char* wanted = std::getenv("HAL_KERNELS_ISA");  // lowers the choice, never raises it
  if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return Isa::baseline;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0) return Isa::avx2;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Isa::avx512 : Isa::avx2;
#else
  return Isa::baseline;
#endif
}

Isa chosen() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace

template <class T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  switch (chosen()) {
    case Isa::avx512:
      return avx512::table<T>;
    case Isa::avx2:
      return avx2::table<T>;
    default:
      break;
  }
#endif
  return baseline::table<T>;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

const Conversions& conversions() {
#if defined(__x86_64__)
  switch (chosen()) {
    case Isa::avx512:
      return avx512::conversion_table;
    case Isa::avx2:
      return avx2::conversion_table;
    default:
      break;
  }
#endif
  return baseline::conversion_table;
}

}  // namespace hal

// For hal_kernels.backends(): what runs here.
extern "C" __attribute__((visibility("default"))) const char* hal_kernels_isa() {
  switch (hal::chosen()) {
    case hal::Isa::avx512:
      return "AVX-512";
    case hal::Isa::avx2:
      return "AVX2";
    default:
#if defined(__x86_64__)
      return "SSE2";
#elif defined(__aarch64__)
      return "NEON";
#else
      return "portable";
#endif
  }
}
