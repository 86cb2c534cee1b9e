// The C interface, called through ctypes: prepare an operand, multiply two, look inside one, rotate a matrix.
//
// C[m, n] = sum_k A[m, k] B[n, k].  Operands are plain memory (fp32 or bf16, either axis contiguous, sizes multiples of 16
// and of their blocks: the caller checks).  All memory that outlives a call is the caller's.
#include <sys/mman.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && \
    defined(__AVX512BF16__)
#include "codes.h"
#include "gemm_bf16.h"
#include "hadamard.h"
#include "operand.h"
#include "stored.h"

template <class T>
static void product(const Packed& a, const Packed& b, T* out) {
  const Output<T> o{out, b.free_size};
  if (a.int8 && b.int8) multiply_int8(a, b, o);
  else multiply<Bf16Rows>(a, b, o);
}

extern "C" {
int lowprec_supported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl");
}

// Asks for large pages: panels lie far apart, and fresh memory is touched in fewer faults.
void lowprec_advise(void* memory, int64_t bytes) {
  constexpr uintptr_t huge = 2 << 20;
  const uintptr_t first = ((uintptr_t)memory + huge - 1) / huge * huge, last = ((uintptr_t)memory + bytes) / huge * huge;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
}

// Rotates, quantises and packs an operand.  `out` comes with its memory and sizes.
void lowprec_prepare(const OperandArgs* args, Packed* out) { Quantiser(*args, *out).run(); }

// Packs an operand whose codes and scales are given.
void lowprec_load(const OperandArgs* args, const CodesArgs* codes, Packed* out) { Loader(*args, *codes, *out).run(); }

// out: (a.free_size, b.free_size) row-major, bf16 or fp32.
void lowprec_multiply(const Packed* a, const Packed* b, void* out, int out_bf16, int threads) {
#pragma omp parallel num_threads(threads)
  out_bf16 ? product(*a, *b, (uint16_t*)out) : product(*a, *b, (float*)out);
}

// Values * block scales: (free_size, k), or (k, free_size) if transposed; bf16 or fp32.
void lowprec_dequantise(const Packed* p, void* out, int out_bf16, int transposed, int threads) {
#pragma omp parallel num_threads(threads)
  out_bf16 ? dequantise(*p, (uint16_t*)out, transposed) : dequantise(*p, (float*)out, transposed);
}

// INT8 codes as bf16 values into out.codes
void lowprec_to_bf16(const Packed* p, const Packed* out, int threads) {
#pragma omp parallel num_threads(threads)
  to_bf16(*p, *out);
}

// A prepared operand to little memory and back; the packed one comes with its memory, sizes and outer scales.
void lowprec_store(const Packed* p, const StoreArgs* s, int threads) {
#pragma omp parallel num_threads(threads)
  store_or_restore<false>(*p, *s);
}
void lowprec_restore(const Packed* p, const StoreArgs* s, int threads) {
#pragma omp parallel num_threads(threads)
  store_or_restore<true>(*p, *s);
}

// Element values (free_size, k) and scales (free_size, k / block), fp32.
void lowprec_unpack(const Packed* p, float* values, float* scales, int threads) {
  const int64_t groups = p->groups();
#pragma omp parallel for num_threads(threads)
  for (int64_t panel = 0; panel < p->free_size / 16; panel++) {
    for (int64_t k = 0; k < p->k; k += 16) {
      V v[16];
      unpack16(*p, panel, k, v);
      transpose16(v);
      for (int i = 0; i < 16; i++) _mm512_storeu_ps(values + (panel * 16 + i) * p->k + k, v[i]);
    }
    for (int64_t g = 0; g < groups; g++)
      for (int i = 0; i < 16; i++) scales[(panel * 16 + i) * groups + g] = p->scales[(panel * groups + g) * 16 + i];
  }
}

void lowprec_rotate(const RotateArgs* args) { rotate_matrix(*args); }

// 64 random 16-bit integers from 8 consecutive counters
void lowprec_philox(const uint32_t* key, const uint32_t* counter, uint64_t first, uint16_t* out_64) {
  philox64({{key[0], key[1]}, {counter[0], counter[1]}}, first, out_64);
}
}
#else
extern "C" int lowprec_supported() { return 0; }
#endif
