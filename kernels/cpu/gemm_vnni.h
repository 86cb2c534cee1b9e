// FP4 products on the int8 unit: exact inside a block, fp32 across blocks, in order.
//
// 2 * E2M1 is an integer in [-12, 12].  vpdpbusd multiplies 4 unsigned by 4 signed bytes per lane and adds them to an
// int32, so one side is stored as code + 12 and every block's accumulator starts at -12 * sum(codes of the other side):
//   x = sum (a + 12) b - 12 sum b = 4 * sum of the element products
// Across blocks:  acc = acc + P (s_a s_b), one rounding a block, as lowprec/linear/oracle.py defines.  P has at most 12
// bits and s_a s_b at most 8, so P (s_a s_b) is exact and the fused multiply-add rounds exactly once; 1/4 is put off to
// the end (a power of two).  Where scales are not that tame (LITERAL), every operation is done and rounded as written.
// 64 multiply-adds an instruction against 32 in bf16, less 3 instructions a block for its scale.
#pragma once
#include "quantise.h"

template <class T>
struct Output {
  T* data;
  int64_t columns;
  float alpha;  // product of the tensor scales
};

enum ScaleMode {
  EXACT,    // P (s_a s_b) is exact
  UNIFORM,  // ... and b's scale is the same for all 16 lanes of a panel (16x16 blocks): one multiplication for 16 rows
  LITERAL,
};

template <int ROWS, int PANELS, int BLOCK, ScaleMode MODE, class T>
static inline void vnni_kernel(const Packed& a, int64_t row, const Packed& b, int64_t panel, const Output<T>& out) {
  constexpr int WORDS = BLOCK / 4;
  const int64_t groups = a.groups(), words = a.k / 4;
  const uint32_t* ap = a.codes + (row / 16) * words * 16 + row % 16;
  const float* as = a.scales + (row / 16) * groups * 16 + row % 16;
  const uint32_t* bp[PANELS];
  const float* bs[PANELS];
  const int32_t* bi[PANELS];
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
#pragma GCC unroll 8
    for (int w = 0; w < WORDS; w++) {
      I bv[PANELS];
      for (int p = 0; p < PANELS; p++) bv[p] = _mm512_loadu_si512(bp[p] + (g * WORDS + w) * 16);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) {
        const I av = splat_bits(ap[(g * WORDS + w) * 16 + i]);
        for (int p = 0; p < PANELS; p++) x[i][p] = _mm512_dpbusd_epi32(x[i][p], av, bv[p]);
      }
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
        if constexpr (MODE != LITERAL) acc[i][p] = _mm512_fmadd_ps(sum, s, acc[i][p]);
        else acc[i][p] = _mm512_add_ps(acc[i][p], _mm512_mul_ps(_mm512_mul_ps(sum, splat(0.25f)), s));
      }
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int p = 0; p < PANELS; p++) {
      const V v = MODE == LITERAL ? acc[i][p] : _mm512_mul_ps(acc[i][p], splat(0.25f));
      store16(out.data + (row + i) * out.columns + (panel + p) * 16, _mm512_mul_ps(v, splat(out.alpha)));
    }
}

// 16 rows of `a` times one or two panels of `b`
template <int BLOCK, ScaleMode MODE>
struct VnniRows {
  template <int PANELS, class T>
  static void run(const Packed& a, int64_t row, const Packed& b, int64_t panel, const Output<T>& out) {
    vnni_kernel<5, PANELS, BLOCK, MODE>(a, row, b, panel, out);
    vnni_kernel<5, PANELS, BLOCK, MODE>(a, row + 5, b, panel, out);
    vnni_kernel<6, PANELS, BLOCK, MODE>(a, row + 10, b, panel, out);
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
