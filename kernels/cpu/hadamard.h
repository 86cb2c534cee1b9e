// Hadamard rotations of a matrix in memory, the same bits as lowprec/numerics/hadamard.py: factors, butterflies at distances
// 1, 2, 4, ... in fp32, one rounding to the matrix's dtype; the inverse multiplies last.  Sizes are powers of two.
//
// Along the fast axis distances below 16 are permutations inside a vector, the others whole vectors; along the slow axis all
// are whole vectors, taken from a copy of 32 columns that fits the second-level cache.  16 vectors at a time: 4 stages.
#pragma once
#include <vector>

#include "tile.h"

struct RotateArgs {  // mirrored in backend.py
  const void* x;
  void* out;
  const float* factors;  // n values
  int64_t rows, columns, n;
  int32_t bf16, along_columns, inverse, threads;  // along_columns: blocks of n consecutive numbers; else of n rows
};

// u + v to the lanes whose index lacks bit H, u - v to the others
template <int H>
static inline V butterfly_lanes(V x) {
  I index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const V other = _mm512_permutexvar_ps(_mm512_xor_si512(index, splat_bits(H)), x);
  const __mmask16 upper = _mm512_test_epi32_mask(index, splat_bits(H));
  return _mm512_mask_sub_ps(_mm512_add_ps(x, other), upper, other, x);
}

// Butterflies over `count` vectors that lie `stride` vectors apart (a power of two), all distances.
static inline void butterflies_far(V* v, int64_t count, int64_t stride) {
  auto stages = [&](auto levels, int64_t h) {
    constexpr int L = decltype(levels)::value, R = 1 << L;
    for (int64_t j = 0; j < count; j += R * h)
      for (int64_t i = j; i < j + h; i++) {
        V t[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) t[r] = v[(i + r * h) * stride];
        butterflies<L>(t);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) v[(i + r * h) * stride] = t[r];
      }
  };
  int64_t h = 1;
  for (; count / h >= 16; h *= 16) stages(std::integral_constant<int, 4>{}, h);
  if (count / h == 8) stages(std::integral_constant<int, 3>{}, h);
  if (count / h == 4) stages(std::integral_constant<int, 2>{}, h);
  if (count / h == 2) stages(std::integral_constant<int, 1>{}, h);
}

template <class T>
static void rotate_along_columns(const RotateArgs& a, V* v) {
  const int64_t n = a.n, chunk = std::max<int64_t>(n, 16);  // small blocks lie side by side in a vector
#pragma omp for schedule(static) collapse(2)
  for (int64_t row = 0; row < a.rows; row++)
    for (int64_t c = 0; c < a.columns; c += chunk) {
      const T* x = (const T*)a.x + row * a.columns + c;
      T* out = (T*)a.out + row * a.columns + c;
      for (int64_t i = 0; i < chunk / 16; i++) {
        V t = load16(x + i * 16);
        const V factor = _mm512_loadu_ps(a.factors + (n < 16 ? 0 : i * 16));
        if (!a.inverse) t = _mm512_mul_ps(t, factor);
        if (n > 1) t = butterfly_lanes<1>(t);
        if (n > 2) t = butterfly_lanes<2>(t);
        if (n > 4) t = butterfly_lanes<4>(t);
        v[i] = n > 8 ? butterfly_lanes<8>(t) : t;
      }
      butterflies_far(v, chunk / 16, 1);
      for (int64_t i = 0; i < chunk / 16; i++) {
        const V factor = _mm512_loadu_ps(a.factors + (n < 16 ? 0 : i * 16));
        store16(out + i * 16, a.inverse ? _mm512_mul_ps(v[i], factor) : v[i]);
      }
    }
}

template <class T>
static void rotate_along_rows(const RotateArgs& a, V* v) {
  constexpr int WIDTH = 2;  // vectors
#pragma omp for schedule(static) collapse(2)
  for (int64_t c = 0; c < a.columns; c += 16 * WIDTH)
    for (int64_t r = 0; r < a.rows; r += a.n) {
      const int width = (int)std::min<int64_t>(WIDTH, (a.columns - c) / 16);
      const T* x = (const T*)a.x + r * a.columns + c;
      T* out = (T*)a.out + r * a.columns + c;
      for (int64_t i = 0; i < a.n; i++) {
        if (i + 8 < a.n) _mm_prefetch((const char*)(x + (i + 8) * a.columns), _MM_HINT_T0);
        for (int j = 0; j < width; j++) {
          const V t = load16(x + i * a.columns + j * 16);
          v[i * width + j] = a.inverse ? t : _mm512_mul_ps(t, splat(a.factors[i]));
        }
      }
      for (int j = 0; j < width; j++) butterflies_far(v + j, a.n, width);
      for (int64_t i = 0; i < a.n; i++)
        for (int j = 0; j < width; j++) {
          const V t = v[i * width + j];
          store16(out + i * a.columns + j * 16, a.inverse ? _mm512_mul_ps(t, splat(a.factors[i])) : t);
        }
    }
}

struct alignas(64) Aligned { V value; };

// Columns must be a multiple of 16; along them, of n; along the rows, rows of n.
static void rotate_matrix(const RotateArgs& a) {
#pragma omp parallel num_threads(a.threads)
  {
    std::vector<Aligned> memory(std::max<int64_t>(a.n * 2, 16));
    V* v = &memory[0].value;
    if (a.bf16) a.along_columns ? rotate_along_columns<uint16_t>(a, v) : rotate_along_rows<uint16_t>(a, v);
    else a.along_columns ? rotate_along_columns<float>(a, v) : rotate_along_rows<float>(a, v);
  }
}
