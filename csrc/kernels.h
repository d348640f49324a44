// The loops over rows that all operators are made of, for the CPU they run on.
//
// kernels_impl.h is compiled once for each instruction set; `kernels<T>()` picks at run time. T is
// the type sums are kept in: float, or double for float64. 16-bit rows are widened to float first.
#pragma once

#include <cstdint>

namespace hal {

// Storage types of 16 bits: bit patterns only, converted by `Conversions`.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Rows are contiguous within; `sx` and the like are distances from one row to the next.
template <class T>
struct Kernels {
  // h = x·pᵀ                x [n, d], p [r, d] dense, h [n, r]
  void (*shrink)(const T* x, int64_t sx, const T* p, T* h, int64_t sh, int64_t n, int64_t r,
                 int64_t d);
  // y = base + c·q          c [n, r] dense, q [r, d] dense; base null is zero, sb = 0 one row for
  //                         all; base may be y itself
  void (*expand)(const T* c, const T* q, const T* base, int64_t sb, T* y, int64_t sy, int64_t n,
                 int64_t r, int64_t d);
  // g += cᵀ·z               c [n, r] dense, z [n, d], g [r, d] dense
  void (*outer)(const T* c, const T* z, int64_t sz, T* g, int64_t n, int64_t r, int64_t d);
  // x[j] *= scale where the random word of (seed, row, j) reaches `threshold`, else x[j] *= 0
  void (*drop)(T* x, int64_t d, uint64_t seed, uint64_t row, uint32_t threshold, T scale);
};

struct Conversions {
  void (*widen_bfloat16)(const BFloat16* from, float* to, int64_t n);
  void (*narrow_bfloat16)(const float* from, BFloat16* to, int64_t n);
  void (*widen_float16)(const Float16* from, float* to, int64_t n);
  void (*narrow_float16)(const float* from, Float16* to, int64_t n);
};

template <class T>
const Kernels<T>& kernels();
const Conversions& conversions();

}  // namespace hal
