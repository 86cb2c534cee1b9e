// Every other product: element values are exact in bf16, products of two in fp32, sums in fp32.
//
// vdpbf16ps adds 2 products per lane to an fp32 accumulator (it flushes subnormals, so scales, which may be extreme, stay
// outside).  Per part of the contracted axis under one scale of each operand, exactly as the definition writes it:
//   acc = acc + part (s_a s_b)
// Inside a part the order of the sum is free: |error| <= 2 k 2^-24 sum|a||b|.  Without blocks along k there is one part.
// Power-of-two scales (MX) may be folded into the codes, which is exact in bf16 while exponents stay moderate; a whole row
// is then one part too, and the inner loop has nothing but multiply-adds.
#pragma once
#include "gemm_vnni.h"

// parts of `words` pairs; ONE keeps a single set of accumulators and so more rows in registers
template <int ROWS, int PANELS, bool ONE, class T>
static inline void bf16_kernel(const Packed& a, int64_t row, const Packed& b, int64_t panel, const Output<T>& out) {
  const int64_t step = ONE ? a.k : std::min(a.block, b.block), parts = ONE ? 1 : a.k / step, words = step / 2;
  const int64_t a_parts = ONE ? 1 : a.block / step, b_parts = ONE ? 1 : b.block / step;  // parts that share a scale
  const int64_t a_groups = ONE ? 1 : a.groups(), b_groups = ONE ? 1 : b.groups();
  const uint32_t* ap = a.codes + (row / 16) * (a.k / 2) * 16 + row % 16;
  const float* as = a.scales + (row / 16) * a_groups * 16 + row % 16;
  const uint32_t* bp[PANELS];
  V acc[ROWS][PANELS], part[ROWS][PANELS];
  for (int p = 0; p < PANELS; p++) {
    bp[p] = b.codes + (panel + p) * (a.k / 2) * 16;
    for (int i = 0; i < ROWS; i++) acc[i][p] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < parts; g++) {
    for (int i = 0; i < ROWS; i++)
      for (int p = 0; p < PANELS; p++) part[i][p] = _mm512_setzero_ps();
    for (int64_t w = 0; w < words; w++, ap += 16) {
      __m512bh bv[PANELS];
      for (int p = 0; p < PANELS; p++, bp[p - 1] += 16) bv[p] = (__m512bh)_mm512_loadu_si512(bp[p]);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const __m512bh av = (__m512bh)splat_bits(ap[i]);
        for (int p = 0; p < PANELS; p++) part[i][p] = _mm512_dpbf16_ps(part[i][p], av, bv[p]);
      }
    }
    const float* sa = as + g / a_parts * 16;
    for (int p = 0; p < PANELS; p++) {
      const V sb = _mm512_loadu_ps(b.scales + ((panel + p) * b_groups + g / b_parts) * 16);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const V scaled = _mm512_mul_ps(part[i][p], _mm512_mul_ps(splat(sa[i]), sb));
        acc[i][p] = _mm512_add_ps(acc[i][p], scaled);
      }
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int p = 0; p < PANELS; p++) store_output(out, a, b, row + i, panel + p, acc[i][p]);
}

struct Bf16Rows {
  template <int PANELS, class T>
  static void run(const Packed& a, int64_t row, const Packed& b, int64_t panel, const Output<T>& out) {
    if (a.groups() == 1 && b.groups() == 1) {
      bf16_kernel<8, PANELS, true>(a, row, b, panel, out);
      bf16_kernel<8, PANELS, true>(a, row + 8, b, panel, out);
    } else {
      bf16_kernel<6, PANELS, false>(a, row, b, panel, out);
      bf16_kernel<6, PANELS, false>(a, row + 6, b, panel, out);
      bf16_kernel<4, PANELS, false>(a, row + 12, b, panel, out);
    }
  }
};
