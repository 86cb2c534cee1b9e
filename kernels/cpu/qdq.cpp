// C interface of the portable quantise-dequantise kernels, called through ctypes by qdq.py.
#include <omp.h>

#include "qdq_gemm.h"
#include "qdq_tile.h"

typedef void (*Visit)(const Job&, int64_t, int64_t, Scratch&);

static void for_each_tile(const Job& j, Visit visit) {
  const int64_t down = (j.rows + j.tile_rows - 1) / j.tile_rows;
  const int64_t across = (j.columns + j.tile_columns - 1) / j.tile_columns;
#pragma omp parallel num_threads(j.threads)
  {
    Scratch s(j);
#pragma omp for schedule(dynamic, 16)
    for (int64_t t = 0; t < down * across; t++) visit(j, t / across * j.tile_rows, t % across * j.tile_columns, s);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);  // streamed stores are weakly ordered
  }
}

template <class T, class O> static Visit choose(const Job& j) {
  switch (kind(j.element)) {
    case FLOAT: return j.stochastic ? quantise_tile<T, O, true, FLOAT> : quantise_tile<T, O, false, FLOAT>;
    case MASKED: return j.stochastic ? quantise_tile<T, O, true, MASKED> : quantise_tile<T, O, false, MASKED>;
    default: return j.stochastic ? quantise_tile<T, O, true, ANY> : quantise_tile<T, O, false, ANY>;
  }
}

template <class T> static Visit choose_output(const Job& j) {
  if (j.output == CODES) return choose<T, uint8_t>(j);
  return j.output == VALUES_BF16 ? choose<T, uint16_t>(j) : choose<T, float>(j);
}

// The largest magnitude of n elements, as a pattern.
template <class T> static uint32_t largest_of(const T* x, int64_t n, int threads) {
  uint32_t result = 0;
  constexpr int64_t STEP = 4 * W, CHUNK = 1 << 14;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) reduction(max : result)
  for (int64_t first = 0; first < n; first += CHUNK) {
    const int64_t end = std::min(n, first + CHUNK);
    int64_t k = first;
    U m[4] = {};
    for (; k + STEP <= end; k += STEP)
      for (int i = 0; i < 4; i++) m[i] = largest(m[i], bits(load(x + k + i * W)) & MAGNITUDE);
    uint32_t found = maximum(largest(largest(m[0], m[1]), largest(m[2], m[3])));
    for (; k < end; k++) {
      const uint32_t one = sizeof(T) == 2 ? (uint32_t)x[k] << 16 : as_bits((float)x[k]);
      found = std::max(found, one & MAGNITUDE);
    }
    result = std::max(result, found);
  }
  return result;
}

extern "C" {
int lowprec_qdq_lanes() { return W; }
int lowprec_qdq_has_product() { return HAS_PRODUCT; }
void lowprec_qdq_product(const Product* p) { multiply(*p); }
void lowprec_qdq(const Job* j) { for_each_tile(*j, j->bf16 ? choose_output<uint16_t>(*j) : choose_output<float>(*j)); }
void lowprec_qdq_sizes(const Job* j) { for_each_tile(*j, j->bf16 ? measure_tile<uint16_t> : measure_tile<float>); }
// The same for one block, the whole tensor, unrotated: a straight pass.
float lowprec_qdq_size(const Job* j) {
  const int64_t n = j->rows * j->columns;
  const int threads = j->threads;
  const uint32_t m = j->bf16 ? largest_of((const uint16_t*)j->x, n, threads) : largest_of((const float*)j->x, n, threads);
  return as_float(m < INF ? m : QNAN);
}
}
