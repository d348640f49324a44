// The kernels for one instruction set. kernels.cpp includes this file once for each, with
//   HAL_ISA     the namespace
//   HAL_TARGET  the attribute that lets the compiler use the instruction set
//   HAL_BYTES   the width of a vector register
// No function of the standard library is called here: its inline functions would be compiled for
// this instruction set and then serve, by the linker's choice, callers on any CPU.
//
// Every sum over columns or rows runs in one fixed order, whatever rows it is blocked with.

#define HAL_INLINE HAL_TARGET static inline __attribute__((always_inline))

namespace hal {
namespace HAL_ISA {

template <class T>
struct Vec {
  typedef T type __attribute__((vector_size(HAL_BYTES)));
  typedef T loose __attribute__((vector_size(HAL_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t size = HAL_BYTES / sizeof(T);
};

template <class T>
HAL_INLINE typename Vec<T>::type load(const T* from) {
  return *reinterpret_cast<const typename Vec<T>::loose*>(from);
}

template <class T>
HAL_INLINE void store(T* to, typename Vec<T>::type v) {
  *reinterpret_cast<typename Vec<T>::loose*>(to) = v;
}

template <class T>
HAL_INLINE T sum(typename Vec<T>::type v) {
  T lanes[Vec<T>::size];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int64_t half = Vec<T>::size / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// ---- h = x·pᵀ: R rows times K directions, all R·K sums in registers ----

template <int R, int K, class T>
HAL_INLINE void shrink_tile(const T* x, int64_t sx, const T* p, T* h, int64_t sh, int64_t d) {
  typename Vec<T>::type acc[R][K] = {};
  int64_t j = 0;
  for (; j + Vec<T>::size <= d; j += Vec<T>::size) {
    typename Vec<T>::type b[K];
    for (int k = 0; k < K; ++k) b[k] = load(p + k * d + j);
    for (int i = 0; i < R; ++i) {
      const typename Vec<T>::type a = load(x + i * sx + j);
      for (int k = 0; k < K; ++k) acc[i][k] += a * b[k];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int k = 0; k < K; ++k) {
      T rest = 0;
      for (int64_t t = j; t < d; ++t) rest += x[i * sx + t] * p[k * d + t];
      h[i * sh + k] = sum<T>(acc[i][k]) + rest;
    }
  }
}

template <int R, class T>
HAL_INLINE void shrink_rows(const T* x, int64_t sx, const T* p, T* h, int64_t sh, int64_t r,
                            int64_t d) {
  int64_t k = 0;
  for (; r - k == 3 || r - k > 4; k += 3) shrink_tile<R, 3>(x, sx, p + k * d, h + k, sh, d);
  for (; r - k >= 2; k += 2) shrink_tile<R, 2>(x, sx, p + k * d, h + k, sh, d);
  if (k < r) shrink_tile<R, 1>(x, sx, p + k * d, h + k, sh, d);
}

template <class T>
HAL_TARGET void shrink(const T* x, int64_t sx, const T* p, T* h, int64_t sh, int64_t n, int64_t r,
                       int64_t d) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) shrink_rows<4>(x + i * sx, sx, p, h + i * sh, sh, r, d);
  for (; i < n; ++i) shrink_rows<1>(x + i * sx, sx, p, h + i * sh, sh, r, d);
}

// ---- y = base + c·q: R rows times J vectors of columns in registers ----

template <int R, int J, class T>
HAL_INLINE void expand_tile(const T* c, const T* q, const T* base, int64_t sb, T* y, int64_t sy,
                            int64_t r, int64_t d) {
  constexpr int64_t size = Vec<T>::size;
  typename Vec<T>::type acc[R][J] = {};
  if (base != nullptr)
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < J; ++j) acc[i][j] = load(base + i * sb + j * size);
  for (int64_t k = 0; k < r; ++k) {
    typename Vec<T>::type b[J];
    for (int j = 0; j < J; ++j) b[j] = load(q + k * d + j * size);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < J; ++j) acc[i][j] += c[i * r + k] * b[j];
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < J; ++j) store(y + i * sy + j * size, acc[i][j]);
}

template <int R, class T>
HAL_INLINE void expand_rows(const T* c, const T* q, const T* base, int64_t sb, T* y, int64_t sy,
                            int64_t r, int64_t d) {
  constexpr int64_t size = Vec<T>::size;
  int64_t j = 0;
  for (; j + 2 * size <= d; j += 2 * size)
    expand_tile<R, 2>(c, q + j, base == nullptr ? base : base + j, sb, y + j, sy, r, d);
  for (; j + size <= d; j += size)
    expand_tile<R, 1>(c, q + j, base == nullptr ? base : base + j, sb, y + j, sy, r, d);
  for (; j < d; ++j) {
    for (int i = 0; i < R; ++i) {
      T total = base == nullptr ? T(0) : base[i * sb + j];
      for (int64_t k = 0; k < r; ++k) total += c[i * r + k] * q[k * d + j];
      y[i * sy + j] = total;
    }
  }
}

template <class T>
HAL_TARGET void expand(const T* c, const T* q, const T* base, int64_t sb, T* y, int64_t sy,
                       int64_t n, int64_t r, int64_t d) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    expand_rows<4>(c + i * r, q, base == nullptr ? base : base + i * sb, sb, y + i * sy, sy, r, d);
  for (; i < n; ++i)
    expand_rows<1>(c + i * r, q, base == nullptr ? base : base + i * sb, sb, y + i * sy, sy, r, d);
}

// ---- g += cᵀ·z: K directions times J vectors of columns in registers, over all rows ----

template <int K, int J, class T>
HAL_INLINE void outer_tile(const T* c, const T* z, int64_t sz, T* g, int64_t n, int64_t r,
                           int64_t d) {
  constexpr int64_t size = Vec<T>::size;
  typename Vec<T>::type acc[K][J];
  for (int k = 0; k < K; ++k)
    for (int j = 0; j < J; ++j) acc[k][j] = load(g + k * d + j * size);
  for (int64_t i = 0; i < n; ++i) {
    for (int j = 0; j < J; ++j) {
      const typename Vec<T>::type b = load(z + i * sz + j * size);
      for (int k = 0; k < K; ++k) acc[k][j] += c[i * r + k] * b;
    }
  }
  for (int k = 0; k < K; ++k)
    for (int j = 0; j < J; ++j) store(g + k * d + j * size, acc[k][j]);
}

template <int J, class T>
HAL_INLINE void outer_columns(const T* c, const T* z, int64_t sz, T* g, int64_t n, int64_t r,
                              int64_t d) {
  int64_t k = 0;
  for (; r - k == 3 || r - k > 4; k += 3) outer_tile<3, J>(c + k, z, sz, g + k * d, n, r, d);
  for (; r - k >= 2; k += 2) outer_tile<2, J>(c + k, z, sz, g + k * d, n, r, d);
  if (k < r) outer_tile<1, J>(c + k, z, sz, g + k * d, n, r, d);
}

template <class T>
HAL_TARGET void outer(const T* c, const T* z, int64_t sz, T* g, int64_t n, int64_t r, int64_t d) {
  constexpr int64_t size = Vec<T>::size;
  int64_t j = 0;
  for (; j + 4 * size <= d; j += 4 * size) outer_columns<4>(c, z + j, sz, g + j, n, r, d);
  for (; j + size <= d; j += size) outer_columns<1>(c, z + j, sz, g + j, n, r, d);
  for (; j < d; ++j)
    for (int64_t k = 0; k < r; ++k)
      for (int64_t i = 0; i < n; ++i) g[k * d + j] += c[i * r + k] * z[i * sz + j];
}

// ---- elementwise ----

// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"), 16 counters at once:
// word w of counter b, lane l of 16, belongs to column 64·b + 16·w + l.
HAL_INLINE void philox(uint32_t (&w)[4][16], uint64_t seed, uint64_t row, uint32_t group) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int l = 0; l < 16; ++l) {
    w[0][l] = 16 * group + l;
    w[1][l] = uint32_t(row);
    w[2][l] = uint32_t(row >> 32);
    w[3][l] = 0;
  }
  for (int round = 0; round < 7; ++round) {
    for (int l = 0; l < 16; ++l) {
      const uint64_t first = uint64_t(0xD2511F53) * w[0][l];
      const uint64_t second = uint64_t(0xCD9E8D57) * w[2][l];
      w[0][l] = uint32_t(second >> 32) ^ w[1][l] ^ key0;
      w[2][l] = uint32_t(first >> 32) ^ w[3][l] ^ key1;
      w[1][l] = uint32_t(second);
      w[3][l] = uint32_t(first);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

template <class T>
HAL_TARGET void drop(T* x, int64_t d, uint64_t seed, uint64_t row, uint32_t threshold, T scale) {
  uint32_t words[4][16];
  for (int64_t j = 0; j < d; j += 64) {
    philox(words, seed, row, uint32_t(j / 64));
    const uint32_t* word = &words[0][0];
    const int64_t n = d - j < 64 ? d - j : 64;
    // A product, also where the factor is 0: NaN and Inf stay visible.
    for (int64_t i = 0; i < n; ++i) x[j + i] *= word[i] >= threshold ? scale : T(0);
  }
}

// ---- 16-bit storage ----

HAL_INLINE float as_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, sizeof(f));
  return f;
}

HAL_INLINE uint32_t as_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof(bits));
  return bits;
}

HAL_TARGET inline void widen_bfloat16(const BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = as_float(uint32_t(from[i].bits) << 16);
}

HAL_TARGET inline void narrow_bfloat16(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = as_bits(from[i]);
    const uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // ties to even
    to[i].bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
  }
}

HAL_TARGET inline void widen_float16(const Float16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t sign = uint32_t(from[i].bits & 0x8000) << 16;
    const uint32_t magnitude = from[i].bits & 0x7FFF;
    // Normal numbers, Inf and NaN: the exponent's bias rises by 112, by 224 and 2⁻¹¹² so that the
    // highest one becomes float's highest. Subnormals: the mantissa below 0.5, minus 0.5.
    const float normal = as_float((magnitude << 13) + (224u << 23)) * 0x1p-112f;
    const float subnormal = as_float(magnitude | (126u << 23)) - 0.5f;
    to[i] = as_float(sign | (magnitude < 0x400 ? as_bits(subnormal) : as_bits(normal)));
  }
}

HAL_TARGET inline void narrow_float16(const float* from, Float16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = as_bits(from[i]), sign = bits & 0x80000000, magnitude = bits ^ sign;
    // Normal result: move the bias, round to even on the way (a carry into the exponent is right,
    // up to Inf). Subnormal result: adding 0.5 lets the hardware round at 2⁻²⁴.
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    uint32_t out = magnitude < (113u << 23) ? subnormal : normal;
    out = magnitude >= 0x477FF000 ? 0x7C00 : out;  // rounds to 65536 or is more
    out = magnitude > 0x7F800000 ? 0x7E00 : out;
    to[i].bits = uint16_t((sign >> 16) | out);
  }
}

template <class T>
constexpr Kernels<T> table = {shrink<T>, expand<T>, outer<T>, drop<T>};
constexpr Conversions conversion_table = {widen_bfloat16, narrow_bfloat16, widen_float16,
                                          narrow_float16};

}  // namespace HAL_ISA
}  // namespace hal

#undef HAL_INLINE
#undef HAL_ISA
#undef HAL_TARGET
#undef HAL_BYTES
