// Vectors of 16 floats, and the rounding of a float to a small floating-point element.
//
// A low-precision element with m mantissa bits and smallest normal exponent E has, in every binade [2^e, 2^(e+1)) with
// e >= E, a grid of step 2^(e-m); below 2^E the step stays 2^(E-m).  Rounding to nearest is then one addition:
//   (a + 2^(e+23-m)) - 2^(e+23-m)
// because the fp32 unit in the last place of the sum IS the step, and fp32 rounds half to even (= half to the even code).
// Stochastic rounding is one integer addition: the bits of the mantissa below the grid are the fraction between the two
// neighbours, in units of 2^-(23-m); add the complement of the random threshold and let the carry decide.
// Subnormals are real here: nothing in this folder may be built with -ffast-math or run with flush-to-zero.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

typedef __m512 V;   // 16 x float
typedef __m512i I;  // 16 x 32 bits, or 8 x 64

constexpr float FLT_MAX_ = 3.402823466385288598e38f;
constexpr uint32_t ABS_MASK = 0x7fffffffu, SIGN_MASK = 0x80000000u, INF_BITS = 0x7f800000u, NAN_BITS = 0x7fc00000u;

inline V splat(float x) { return _mm512_set1_ps(x); }
inline I splat_bits(uint32_t x) { return _mm512_set1_epi32((int)x); }
inline I bits(V x) { return _mm512_castps_si512(x); }
inline V from_bits(I x) { return _mm512_castsi512_ps(x); }
inline float bits_to_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
inline uint32_t float_to_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline V abs_(V x) { return from_bits(_mm512_and_si512(bits(x), splat_bits(ABS_MASK))); }

// Maxima run over the integer patterns of |x|: ordered like the floats, with inf and then nan on top.  The float
// instruction (vmaxps) drops a nan silently, which would turn a broken tensor into plausible numbers.
inline I abs_bits(V x) { return _mm512_and_si512(bits(x), splat_bits(ABS_MASK)); }
inline I max_bits(I a, I b) { return _mm512_max_epi32(a, b); }

// fp32 -> bf16, nearest even, in the upper half of each lane.  By integers: vcvtneps2bf16 would flush subnormals.  A nan
// must have an empty lower half, as those of bf16 inputs and of arithmetic have; another could overflow into a zero.
inline I round_bf16_bits(V x) {
  const I u = bits(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), splat_bits(1));
  return _mm512_add_epi32(u, _mm512_add_epi32(odd, splat_bits(0x7fff)));
}
inline V round_bf16(V x) { return from_bits(_mm512_and_si512(round_bf16_bits(x), splat_bits(0xffff0000u))); }

inline V load16(const float* p) { return _mm512_loadu_ps(p); }
inline V load16(const uint16_t* p) {  // bf16 -> fp32
  return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void store16(float* p, V x) { _mm512_storeu_ps(p, x); }
inline void store16(uint16_t* p, V x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16_bits(x), 16)));
}

struct E2M1 { static constexpr int MIN_EXPONENT = 0, MANTISSA = 1; static constexpr float MAX = 6.f; };
struct E4M3 { static constexpr int MIN_EXPONENT = -6, MANTISSA = 3; static constexpr float MAX = 448.f; };
struct E5M2 { static constexpr int MIN_EXPONENT = -14, MANTISSA = 2; static constexpr float MAX = 57344.f; };

// y clamped to +-MAX and rounded to the grid of E.  `random` holds integers in [0, 65536), used when STOCHASTIC:
// up with probability (|y|-lo)/step, that is iff (random + 0.5)/65536 < (|y|-lo)/step.
template <class E, bool STOCHASTIC>
inline V round_element(V y, I random) {
  constexpr int S = 23 - E::MANTISSA;  // mantissa bits below the grid
  const I sign = _mm512_and_si512(bits(y), splat_bits(SIGN_MASK));
  V a = _mm512_min_ps(abs_(y), splat(E::MAX));
  if constexpr (!STOCHASTIC) {
    const I e = _mm512_max_epi32(_mm512_and_si512(bits(a), splat_bits(INF_BITS)), splat_bits((127 + E::MIN_EXPONENT) << 23));
    const V magic = from_bits(_mm512_add_epi32(e, splat_bits(S << 23)));
    a = _mm512_sub_ps(_mm512_add_ps(a, magic), magic);
  } else {
    // Below the smallest normal, adding it moves a into a binade with the same step; rounding that sum UP keeps the
    // comparison "fraction > threshold" exact, because every threshold is itself on the fp32 grid of the sum.
    const V base = from_bits(splat_bits((127 + E::MIN_EXPONENT) << 23));
    const __mmask16 tiny = _mm512_cmp_ps_mask(a, base, _CMP_LT_OQ);
    const V t = _mm512_mask_add_round_ps(a, tiny, a, base, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    const I carry = _mm512_sub_epi32(splat_bits((1u << S) - 1 - (1u << (S - 17))), _mm512_slli_epi32(random, S - 16));
    a = from_bits(_mm512_andnot_si512(splat_bits((1u << S) - 1), _mm512_add_epi32(bits(t), carry)));
    a = _mm512_mask_sub_ps(a, tiny, a, base);
  }
  return from_bits(_mm512_or_si512(bits(a), sign));
}

// v[i] lane j  <->  v[j] lane i
inline void transpose16(V* v) {
  V t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    auto pd = [&](int k) { return _mm512_castps_pd(t[4 * i + k]); };
    v[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(0), pd(2)));
    v[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(0), pd(2)));
    v[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(1), pd(3)));
    v[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(1), pd(3)));
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
