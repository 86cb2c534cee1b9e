// Products of integers on the int8 unit: exact inside a block, fp32 across blocks, in order.
//
// 2 * E2M1 is an integer in [-12, 12]; INT8 is one anyway.  vpdpbusd multiplies 4 unsigned by 4 signed bytes per lane and
// adds them to an int32, so side a is stored as code + 128 and every block's accumulator starts at -128 * sum(codes of b):
//   P = sum (a + 128) b - 128 sum b = sum of the products of the codes       (mod 2^32, so only P itself must fit)
// Across blocks:  acc = acc + P u (s_a s_b), one rounding a block, as lowprec/linear/oracle.py defines; u = 1 / (code scales),
// a power of two.  Where P (s_a s_b) has at most 24 bits the fused multiply-add rounds exactly once, and u is put off to
// the end.  Where scales are not that tame (LITERAL), every operation is done and rounded as written.
// 64 multiply-adds an instruction against 32 in bf16, less 3 instructions a block for its scale.
#pragma once
#include <omp.h>

#include "packed.h"

template <class T>
struct Output {
  T* data;
  int64_t columns;
};

// 16 outputs of one row: times the outer scales of both operands
template <class T>
static inline void store_output(const Output<T>& out, const Packed& a, const Packed& b, int64_t row, int64_t panel, V v) {
  const V alpha = _mm512_mul_ps(splat(a.outer[row]), _mm512_loadu_ps(b.outer + panel * 16));
  store16(out.data + row * out.columns + panel * 16, _mm512_mul_ps(v, alpha));
}

enum ScaleMode {
  EXACT,    // P (s_a s_b) is exact
  UNIFORM,  // ... and b's scale is the same for all 16 lanes of a panel (16x16 blocks): one multiplication for 16 rows
  LITERAL,
  ONE_PART,  // no blocks along k
};

// WORDS: 32-bit words of a block; 0: any
template <int ROWS, int PANELS, int WORDS, ScaleMode MODE, class T>
static inline void vnni_kernel(const Packed& a, int64_t row, const Packed& b, int64_t panel, const Output<T>& out) {
  const int64_t groups = MODE == ONE_PART ? 1 : a.groups(), words = a.k / 4, block_words = WORDS ? WORDS : a.block / 4;
  const uint32_t* ap = a.codes + (row / 16) * words * 16 + row % 16;
  const float* as = a.scales + (row / 16) * groups * 16 + row % 16;
  const uint32_t* bp[PANELS];
  const float* bs[PANELS];
  const int32_t* bi[PANELS];
  const V unit = splat(1.f / (a.code_scale * b.code_scale));
  V acc[ROWS][PANELS];
  for (int p = 0; p < PANELS; p++) {
    bp[p] = b.codes + (panel + p) * words * 16;
    bs[p] = b.scales + (panel + p) * groups * 16;
    bi[p] = b.starts + (panel + p) * groups * 16;
    for (int i = 0; i < ROWS; i++) acc[i][p] = _mm512_setzero_ps();
  }
  V s_ab[PANELS];
  for (int64_t g = 0; g < groups; g++) {
    if constexpr (MODE == UNIFORM)
      for (int p = 0; p < PANELS; p++)
        s_ab[p] = _mm512_mul_ps(_mm512_loadu_ps(as - row % 16 + g * 16), splat(bs[p][g * 16]));
    I x[ROWS][PANELS];
    for (int p = 0; p < PANELS; p++) {
      const I start = _mm512_loadu_si512(bi[p] + g * 16);
      for (int i = 0; i < ROWS; i++) x[i][p] = start;
    }
    auto word = [&](int64_t w) {
      I bv[PANELS];
      for (int p = 0; p < PANELS; p++) bv[p] = _mm512_loadu_si512(bp[p] + w * 16);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) {
        const I av = splat_bits(ap[w * 16 + i]);
        for (int p = 0; p < PANELS; p++) x[i][p] = _mm512_dpbusd_epi32(x[i][p], av, bv[p]);
      }
    };
    if constexpr (WORDS) {
#pragma GCC unroll 8
      for (int w = 0; w < WORDS; w++) word(g * WORDS + w);
    } else {
      for (int64_t w = g * block_words; w < (g + 1) * block_words; w++) word(w);
    }
    V sb[PANELS];
    for (int p = 0; p < PANELS; p++) sb[p] = _mm512_loadu_ps(bs[p] + g * 16);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      const V sa = splat(as[g * 16 + i]);
      for (int p = 0; p < PANELS; p++) {
        const V sum = _mm512_cvtepi32_ps(x[i][p]);
        const I lane = splat_bits(row % 16 + i);
        const V s = MODE == UNIFORM ? _mm512_permutexvar_ps(lane, s_ab[p]) : _mm512_mul_ps(sa, sb[p]);
        if constexpr (MODE == ONE_PART) acc[i][p] = _mm512_mul_ps(_mm512_mul_ps(sum, unit), s);
        else if constexpr (MODE == LITERAL) acc[i][p] = _mm512_add_ps(acc[i][p], _mm512_mul_ps(_mm512_mul_ps(sum, unit), s));
        else acc[i][p] = _mm512_fmadd_ps(sum, s, acc[i][p]);
      }
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int p = 0; p < PANELS; p++)
      store_output(out, a, b, row + i, panel + p, MODE >= LITERAL ? acc[i][p] : _mm512_mul_ps(acc[i][p], unit));
}

// 16 rows of `a` times one or two panels of `b`
template <int WORDS, ScaleMode MODE>
struct VnniRows {
  template <int PANELS, class T>
  static void run(const Packed& a, int64_t row, const Packed& b, int64_t panel, const Output<T>& out) {
    if constexpr (MODE == ONE_PART) {
      vnni_kernel<8, PANELS, WORDS, MODE>(a, row, b, panel, out);
      vnni_kernel<8, PANELS, WORDS, MODE>(a, row + 8, b, panel, out);
    } else {
      vnni_kernel<5, PANELS, WORDS, MODE>(a, row, b, panel, out);
      vnni_kernel<5, PANELS, WORDS, MODE>(a, row + 5, b, panel, out);
      vnni_kernel<6, PANELS, WORDS, MODE>(a, row + 10, b, panel, out);
    }
  }
};

// The outer loops, shared with the bf16 products: a block of rows of `a` stays in the second-level cache while panels of
// `b` pass by.  Called by all threads of a team.  Every output is computed by one thread over all of k, so results do not
// depend on the number of threads.
template <class Rows, class T>
static void multiply(const Packed& a, const Packed& b, const Output<T>& out) {
  const int64_t m = a.free_size, panels = b.free_size / 16;
  const int64_t row_bytes = a.k * 4 / a.per() + a.groups() * 4;
  const int64_t rows = std::max<int64_t>(16, std::min<int64_t>(96, (384 << 10) / row_bytes / 16 * 16));
  const int64_t row_blocks = (m + rows - 1) / rows;
  const int64_t wanted = (4 * omp_get_num_threads() + row_blocks - 1) / row_blocks;  // cuts, for 4 tasks a thread
  const int64_t width = ((panels + wanted - 1) / wanted + 1) / 2 * 2;
#pragma omp for schedule(dynamic) collapse(2) nowait
  for (int64_t block = 0; block < row_blocks; block++)
    for (int64_t first = 0; first < panels; first += width) {
      const int64_t last = std::min(panels, first + width), end = std::min(m, (block + 1) * rows);
      int64_t p = first;
      for (; p + 2 <= last; p += 2)
        for (int64_t r = block * rows; r < end; r += 16) Rows::template run<2>(a, r, b, p, out);
      for (; p < last; p++)
        for (int64_t r = block * rows; r < end; r += 16) Rows::template run<1>(a, r, b, p, out);
    }
}

// Whether P (s_a s_b) has at most fp32's 24 bits, and no partial result leaves the range of normal numbers.
static inline bool exact_products(const Packed& a, const Packed& b) {
  const double largest = (double)a.code_max * b.code_max * a.block;
  int bits = a.scale_bits + b.scale_bits;
  for (double power = 1; power < largest; power *= 2) bits++;
  return bits <= 24 && a.low + b.low >= -90 && a.high + b.high <= 90;
}

template <class T>
static void multiply_int8(const Packed& a, const Packed& b, const Output<T>& out) {
  const bool exact = exact_products(a, b);
  if (a.groups() == 1) multiply<VnniRows<0, ONE_PART>>(a, b, out);
  else if (a.block == 16 && !exact) multiply<VnniRows<4, LITERAL>>(a, b, out);
  else if (a.block == 16 && b.uniform) multiply<VnniRows<4, UNIFORM>>(a, b, out);
  else if (a.block == 16) multiply<VnniRows<4, EXACT>>(a, b, out);
  else if (a.block == 32 && exact) multiply<VnniRows<8, EXACT>>(a, b, out);
  else if (exact) multiply<VnniRows<0, EXACT>>(a, b, out);
  else multiply<VnniRows<0, LITERAL>>(a, b, out);
}
