// out (m, n) fp32 = a (m, k) b (n, k)^T of bf16 operands, with fp32 sums: torch on a CPU gives the product of two bf16
// matrices in bf16 only.  For CPUs with AVX512-BF16; elsewhere there is none and torch multiplies in fp32.
//
// One instruction multiplies 16 pairs (k, k + 1) of bf16 and adds them up in fp32.  So both operands are packed as pairs:
// panels of ROWS rows of a and COLUMNS rows of b, one dword a pair, in the order in which the inner loop reads them.
#pragma once
#include <algorithm>
#include <vector>

#include "qdq_simd.h"

struct Matrix {  // (rows, k) bf16: element r, i at data[r * row + i * step], one of the strides 1
  const uint16_t* data;
  int64_t rows, row, step;
};

struct Product {
  Matrix a, b;
  float* out;
  const float *scale_a, *scale_b;  // what multiplies rows and columns of the output
  int64_t k, scale_a_step, scale_b_step;  // steps 0: one for all
  int32_t threads;
};

#if defined(__AVX512BF16__) && LOWPREC_AVX512
constexpr int ROWS = 12, COLUMNS = 32, DEPTH = 1024, BLOCK_M = 16 * ROWS, BLOCK_N = 16 * COLUMNS;

// Rows r.. (`panel` of them, zeros beyond the end), k0.. (`depth`, even) -> depth / 2 groups of `panel` pairs.
static void pack(const Matrix& x, int64_t r, int64_t panel, int64_t k0, int64_t depth, int64_t k, uint32_t* out) {
  const int64_t rows = std::min(panel, x.rows - r);
  const uint16_t* from = x.data + r * x.row + k0 * x.step;
  for (int64_t i = 0; i < depth; i += 2, out += panel, from += 2 * x.step) {
    const bool pair = k0 + i + 1 < k;
    for (int64_t j = 0; j < rows; j++) out[j] = from[j * x.row] | (pair ? (uint32_t)from[j * x.row + x.step] << 16 : 0u);
    for (int64_t j = rows; j < panel; j++) out[j] = 0;
  }
}

static void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t pairs, float c[ROWS][COLUMNS]) {
  __m512 acc[ROWS][2] = {};
  for (int64_t p = 0; p < pairs; p++, a += ROWS, b += COLUMNS) {
    const __m512bh b0 = load_as<__m512bh>(b), b1 = load_as<__m512bh>(b + 16);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      const __m512bh ai = (__m512bh)_mm512_set1_epi32((int)a[i]);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], ai, b0);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], ai, b1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; i++) {
    store(c[i], (V)acc[i][0]);
    store(c[i] + 16, (V)acc[i][1]);
  }
}

static void add_tile(const Product& p, const float c[ROWS][COLUMNS], int64_t r, int64_t s, bool first, bool last) {
  const int64_t n = p.b.rows, rows = std::min<int64_t>(ROWS, p.a.rows - r), columns = std::min<int64_t>(COLUMNS, n - s);
  for (int64_t i = 0; i < rows; i++) {
    float* to = p.out + (r + i) * n + s;
    for (int64_t j = 0; j < columns; j++) {
      float v = first ? c[i][j] : to[j] + c[i][j];
      if (last) v *= p.scale_a[(r + i) * p.scale_a_step] * p.scale_b[(s + j) * p.scale_b_step];
      to[j] = v;
    }
  }
}

static void multiply(const Product& p) {
  const int64_t m = p.a.rows, n = p.b.rows, panels = (n + COLUMNS - 1) / COLUMNS;
  const int64_t down = (m + BLOCK_M - 1) / BLOCK_M, across = (n + BLOCK_N - 1) / BLOCK_N;
  std::vector<uint32_t> packed_b((size_t)(panels * COLUMNS * DEPTH / 2));
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<uint32_t> packed_a((size_t)BLOCK_M * DEPTH / 2);
    alignas(64) float c[ROWS][COLUMNS];
    for (int64_t k0 = 0; k0 < p.k; k0 += DEPTH) {
      const int64_t depth = std::min<int64_t>(DEPTH, (p.k - k0 + 1) & ~(int64_t)1), pairs = depth / 2;
#pragma omp for schedule(dynamic)
      for (int64_t j = 0; j < panels; j++)
        pack(p.b, j * COLUMNS, COLUMNS, k0, depth, p.k, packed_b.data() + j * pairs * COLUMNS);
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < down * across; t++) {
        const int64_t r0 = t / across * BLOCK_M, r1 = std::min(m, r0 + BLOCK_M), first = t % across * (BLOCK_N / COLUMNS);
        for (int64_t r = r0; r < r1; r += ROWS) pack(p.a, r, ROWS, k0, depth, p.k, packed_a.data() + (r - r0) * pairs);
        for (int64_t j = first; j < std::min(panels, first + BLOCK_N / COLUMNS); j++)
          for (int64_t r = r0; r < r1; r += ROWS) {
            multiply_panels(packed_a.data() + (r - r0) * pairs, packed_b.data() + j * pairs * COLUMNS, pairs, c);
            add_tile(p, c, r, j * COLUMNS, k0 == 0, k0 + DEPTH >= p.k);
          }
      }
    }
  }
}
constexpr bool HAS_PRODUCT = true;
#else
static void multiply(const Product&) {}
constexpr bool HAS_PRODUCT = false;
#endif
