// Vectors of 16 floats, and the rounding of a float to a small element.
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

// Which numbers an element has, beyond its sign.  Integers are minifloats whose only binade is the last: int8 has steps of
// 1 up to 127, so min_exponent 6 and mantissa 6.  Mid-rise grids (.5, 1.5, ..., no zero; QuEST, arXiv:2502.05003) are
// integers moved by a half.  `mantissa` of MASKED elements (arXiv:2405.18710) is all there is: exponents are fp32's own.
enum ElementKind { MINIFLOAT = 0, MIDRISE = 1, MASKED = 2, ANY = 3 };  // ANY: not quantised

struct Element {  // mirrored in operand.py
  int32_t kind, min_exponent, mantissa;
  float max;
};

// An element as vectors that stay in registers.
struct Grid {
  I smallest, magic_shift, mask, carry, shift;
  V base, max, offset;
  explicit Grid(const Element& e) {
    const int s = 23 - e.mantissa;  // mantissa bits below the grid
    smallest = splat_bits((uint32_t)(127 + e.min_exponent) << 23);
    magic_shift = splat_bits((uint32_t)s << 23);
    mask = splat_bits((1u << s) - 1);
    carry = splat_bits((1u << s) - 1 - (s >= 17 ? 1u << (s - 17) : 0));
    shift = splat_bits(s - 16);
    base = from_bits(smallest);
    max = splat(e.max);
    offset = splat(0.5f);
  }
};

enum Rounding { NEAREST, STOCHASTIC, NEAREST_MIDRISE, NEAREST_MASKED, UNROUNDED };

// y clamped to +-max and rounded to the grid.  `random` holds integers in [0, 65536), used when STOCHASTIC: up with
// probability (|y|-lo)/step, that is iff (random + 0.5)/65536 < (|y|-lo)/step.
template <Rounding R>
inline V round_to(const Grid& grid, V y, I random) {
  if constexpr (R == UNROUNDED) return y;
  const I sign = _mm512_and_si512(bits(y), splat_bits(SIGN_MASK));
  V a = _mm512_min_ps(abs_(y), grid.max);
  if constexpr (R == STOCHASTIC) {
    // Below the smallest normal, adding it moves a into a binade with the same step; rounding that sum UP keeps the
    // comparison "fraction > threshold" exact, because every threshold is itself on the fp32 grid of the sum.
    const __mmask16 tiny = _mm512_cmp_ps_mask(a, grid.base, _CMP_LT_OQ);
    const V t = _mm512_mask_add_round_ps(a, tiny, a, grid.base, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    const I carry = _mm512_sub_epi32(grid.carry, _mm512_sllv_epi32(random, grid.shift));
    a = from_bits(_mm512_andnot_si512(grid.mask, _mm512_add_epi32(bits(t), carry)));
    a = _mm512_mask_sub_ps(a, tiny, a, grid.base);
  } else if constexpr (R == NEAREST_MASKED) {  // by integers: fp32's largest numbers leave no room for the addition
    const I half = _mm512_srli_epi32(grid.mask, 1), step = _mm512_add_epi32(grid.mask, splat_bits(1));
    const __mmask16 odd = _mm512_test_epi32_mask(bits(a), step);
    I u = _mm512_add_epi32(bits(a), half);
    u = _mm512_mask_add_epi32(u, odd, u, splat_bits(1));
    a = _mm512_min_ps(from_bits(_mm512_andnot_si512(grid.mask, u)), grid.max);
  } else {
    if constexpr (R == NEAREST_MIDRISE) a = _mm512_max_ps(_mm512_sub_ps(a, grid.offset), V{});
    const I e = _mm512_max_epi32(_mm512_and_si512(bits(a), splat_bits(INF_BITS)), grid.smallest);
    const V magic = from_bits(_mm512_add_epi32(e, grid.magic_shift));
    a = _mm512_sub_ps(_mm512_add_ps(a, magic), magic);
    if constexpr (R == NEAREST_MIDRISE) a = _mm512_add_ps(a, grid.offset);
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
