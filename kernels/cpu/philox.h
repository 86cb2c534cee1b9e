// Random bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11; Random123).
//
// A counter-based generator: bits = f(key, counter), no state.  Element i of a tensor (row-major, as it lies in memory)
// uses counter (i/8 low, i/8 high, c2, c3), and of the 4 x 32 output bits the 16 at position i%8.  So the bits of an
// element do not depend on tiles, threads or the order of evaluation.
//
// One call makes 8 counters = 64 elements.  Each 32-bit state word sits in the low half of a 64-bit lane, because the
// 32 x 32 -> 64 bit multiplication (vpmuludq) reads exactly that half and ignores whatever is above: a round is then two
// multiplications, two shifts and two three-way xors.
#pragma once
#include "simd.h"

struct PhiloxKey {
  uint32_t key[2];      // (seed, layer, role) hashed by the caller
  uint32_t counter[2];  // c2, c3: step, micro-batch
};

inline void philox64(const PhiloxKey& k, uint64_t first_counter, uint16_t* out_64) {
  const I m0 = _mm512_set1_epi64(0xD2511F53u), m1 = _mm512_set1_epi64(0xCD9E8D57u);
  I x0 = _mm512_add_epi64(_mm512_set1_epi64((long long)first_counter), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  I x1 = _mm512_srli_epi64(x0, 32), x2 = splat_bits(k.counter[0]), x3 = splat_bits(k.counter[1]);
  uint32_t k0 = k.key[0], k1 = k.key[1];
  for (int round = 0; round < 10; round++) {
    const I p0 = _mm512_mul_epu32(x0, m0), p1 = _mm512_mul_epu32(x2, m1);
    x0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x1, splat_bits(k0), 0x96);
    x2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x3, splat_bits(k1), 0x96);
    x1 = p1;
    x3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const I low = _mm512_set1_epi64(0xffffffffu);
  const I a = _mm512_or_si512(_mm512_and_si512(x0, low), _mm512_slli_epi64(x1, 32));
  const I b = _mm512_or_si512(_mm512_and_si512(x2, low), _mm512_slli_epi64(x3, 32));
  const I first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  _mm512_storeu_si512(out_64, _mm512_permutex2var_epi64(a, first, b));
  _mm512_storeu_si512(out_64 + 32, _mm512_permutex2var_epi64(a, second, b));
}
