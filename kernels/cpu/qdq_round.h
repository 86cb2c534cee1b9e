// Rounding to an element and choosing a block's scale: lowprec/numerics/element.py and scale.py, W lanes at a time.
//
// The elements here are evenly spaced inside each binade: a minifloat with m mantissa bits and smallest normal exponent
// E has the step 2^(e-m) in [2^e, 2^(e+1)) for e >= E, and 2^(E-m) below.  An integer is the case that never reaches
// 2^E, a mid-rise grid is one shifted by half a step.  So one routine with three run-time numbers rounds to all of them:
//   nearest     (a + 2^(e+23-m)) - 2^(e+23-m): the fp32 unit in the last place of the sum IS the step, and fp32 rounds
//               half to even, which is half to the even code;
//   stochastic  a / step, its floor, and one comparison of the fraction with the random threshold; all exact.
// MASKED elements have fp32's own exponents (bf16 with fewer mantissa bits): there both are integer additions.
#pragma once
#include "qdq_simd.h"

struct Element {
  int32_t min_exponent, mantissa, bits, twos_complement, masked;
  float max, offset;  // offset: 0, or 1/2 for a mid-rise grid
};

enum Kind { ANY, FLOAT, MASKED };  // FLOAT: with zero, sign and at most six mantissa bits, so the quickest

INLINE Kind kind(const Element& e) {
  return e.masked ? MASKED : e.offset == 0 && !e.twos_complement && e.mantissa <= 6 ? FLOAT : ANY;
}

template <bool STOCHASTIC, Kind KIND>
struct Rounder {
  const Element e;
  const bool shifted;  // a mid-rise grid
  U least, shift;  // patterns: of 2^E; of a factor 2^m (stochastic) or 2^(23-m)
  U carry, keep;  // stochastic: all but the threshold; the bits of the grid
  V max, offset;
  explicit Rounder(const Element& element) : e(element), shifted(KIND != FLOAT && element.offset != 0) {
    least = splat_bits((uint32_t)(127 + e.min_exponent) << 23);
    shift = splat_bits((uint32_t)(STOCHASTIC ? e.mantissa : 23 - e.mantissa) << 23);
    const uint32_t cut = 23 - (uint32_t)e.mantissa;
    carry = splat_bits((1u << cut) - 1 - (cut > 16 ? 1u << (cut - 17) : 0));
    keep = splat_bits(~((1u << cut) - 1));
    max = splat(e.max - e.offset);
    offset = splat(e.offset);
  }
  INLINE_MEMBER U threshold_bits(const uint16_t* random) const { return widened(load_as<H>(random)); }
  INLINE_MEMBER bool is_shifted() const { return KIND != FLOAT && shifted; }

  // |y| -> grid, less the offset.  `random`: W integers in [0, 65536); up with probability (|y| - low) / step, that is
  // iff (random + 1/2) / 65536 < (|y| - low) / step.  NaN becomes max.
  INLINE_MEMBER V magnitude(V y, const uint16_t* random) const {
    V a = floats(bits(y) & MAGNITUDE);
    if constexpr (KIND == MASKED) {
      const int cut = 23 - e.mantissa;
      const U u = bits(a), mask = splat_bits((1u << cut) - 1);
      if constexpr (!STOCHASTIC) {
        a = floats((u + (mask >> 1) + ((u >> cut) & 1)) & ~mask);
      } else {
        const U twice = (threshold_bits(random) << 1 | 1) << (cut - 16);  // 2^(cut+1) * threshold
        a = floats((u & ~mask) + ((U)(twice < ((u & mask) << 1)) & (1u << cut)));
      }
      return smallest(a, max);
    }
    if (is_shifted()) a = floats(bits(a - offset) & ~(U)((S)bits(a - offset) >> 31));
    a = smallest(a, max);
#if LOWPREC_AVX512
    // The same comparison as one integer addition whose carry decides.  Below 2^E the sum with 2^E has the grid's step;
    // rounding that sum up keeps the comparison exact, because every threshold lies on the fp32 grid of the sum.
    if (STOCHASTIC && (KIND == FLOAT || e.mantissa <= 6)) {
      const __m512 base = (__m512)least, x = (__m512)a;
      const __mmask16 below = _mm512_cmp_ps_mask(x, base, _CMP_LT_OQ);
      const U t = (U)_mm512_mask_add_round_ps(x, below, x, base, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
      const __m512 up = (__m512)((t + (carry - (threshold_bits(random) << (7 - e.mantissa)))) & keep);
      return (V)_mm512_mask_sub_ps(up, below, up, base);
    }
#endif
    const U exponent = largest(bits(a) & INF, least);
    if constexpr (!STOCHASTIC) {
      const V magic = floats(exponent + shift);
      return (a + magic) - magic;
    } else {
      const V steps = a * floats(splat_bits(254u << 23) + shift - exponent), low = floor_(steps);
      const V threshold = floats((threshold_bits(random) << 7) | 0x3f800040u) - 1.f;
      return (low + (threshold < steps - low ? splat(1.f) : V{})) * floats(exponent - shift);
    }
  }
  // The sign that the value of y bears: that of y, but two's complement has no negative zero.
  INLINE_MEMBER U sign(V y, V a) const {
    const U s = bits(y) & SIGN;
    return KIND != FLOAT && e.twos_complement ? s & (U)(a != 0.f) : s;
  }
  // The code of the value; 0 for NaN.
  INLINE_MEMBER U code(V y, V a) const {
    U index;
    if constexpr (KIND == MASKED) index = bits(a) >> (23 - e.mantissa);
    else {
      const S below = a < floats(least);
      const U raised = bits(below ? a + floats(least) : a) >> (23 - e.mantissa);
      index = raised - ((uint32_t)(127 + e.min_exponent) << e.mantissa) + (~(U)below & (1u << e.mantissa));
    }
    const U negative = (U)((S)bits(y) >> 31), known = (U)(y == y);
    if (KIND != FLOAT && e.twos_complement) return ((index ^ negative) - negative) & ((1u << e.bits) - 1) & known;
    return (index | (negative & (1u << (e.bits - 1)))) & known;
  }
};

// ---- scales: block sizes -> multiplier and stored scale --------------------------------------------------------------

enum ScaleRule { NONE, FP32, POW2, E8M0_RCEIL, E8M0_FLOOR, E8M0_CEIL, E8M0_EVEN, E4M3, UE5M3 };
enum ZeroRule { KEEP, ONE, MIN };

constexpr int MAX_TARGETS = 4;

struct ScaleArgs {
  int32_t rule, te_2_14, zero, max_exponent, mantissa_bits, has_zero;  // of the element: floor(log2(max)), mantissa, 0
  int32_t targets, absolute;  // candidates a block chooses between; by the sum of |error|, else of its square
  float element_max, largest_target, inverse_guard, input_max, unit;  // unit: what tensor sizes are divided by
  float target[MAX_TARGETS], inverse_target[MAX_TARGETS], target_ratio[MAX_TARGETS];
};

INLINE V where(S condition, V a, V b) { return condition ? a : b; }
INLINE V power(S exponent) {  // 2 ** (exponent - 127) for 0..254
  return floats(exponent == 0 ? splat_bits(0x400000) : (U)exponent << 23);
}

INLINE void power_of_two_scale(const ScaleArgs& s, V size, V& multiplier, V& scale) {
  S e;
  if (s.rule == E8M0_RCEIL) {
    const U b = bits(size / s.element_max), exponent = b >> 23, fraction = b & 0x7fffff;
    e = (S)exponent - ((fraction > 0) & ~((exponent == 0) & (fraction <= 0x400000)));
  } else {
    const U b = bits(size) + (s.rule == E8M0_EVEN ? 1u << (22 - s.mantissa_bits) : 0u);
    e = (S)(b >> 23) - s.max_exponent;
    if (s.rule == E8M0_CEIL) e -= (b & 0x7fffff) > 0;
  }
  e = e < 0 ? S{} : e;
  e = e > 254 ? S{} + 254 : e;
  multiplier = power(254 - e);
  if (s.inverse_guard != 1.f) multiplier *= s.inverse_guard;
  scale = power(e);
}

INLINE void two_level_scale(const ScaleArgs& s, int t, V size, V enc, V& multiplier, V& scale) {
  V wanted;
  if (s.te_2_14) {
    wanted = (size / s.largest_target) * enc;
    if (s.target[t] != s.largest_target) wanted *= s.target_ratio[t];
  } else {
    wanted = size * (enc * s.inverse_target[t]);
  }
  const bool wide = s.rule == UE5M3;  // the scale's own grid: three mantissa bits, exponents from -14 or from -6
  const V a = smallest(wanted, splat(wide ? 61440.f : 448.f));
  const V magic = floats(largest(bits(a) & INF, splat_bits(wide ? 113u << 23 : 121u << 23)) + (20u << 23));
  scale = (a + magic) - magic;
  if (s.zero != KEEP) scale = where(scale == 0.f, splat(s.zero == ONE ? 1.f : wide ? 0x1p-17f : 0x1p-9f), scale);
  multiplier = smallest(1.f / (scale * (1.f / enc)), splat(FLT_MAX_));
}

// size: >= 0, or NaN for a block that holds one; enc: the tensor's encode scale (two-level rules only); t: the target.
INLINE void block_scale(const ScaleArgs& s, int t, V size, V enc, V& multiplier, V& scale) {
  const V nan = floats(splat_bits(QNAN));
  if (s.rule == NONE) multiplier = scale = splat(1.f);
  else if (s.rule >= E4M3) two_level_scale(s, t, size, enc, multiplier, scale);
  else if (s.rule >= E8M0_RCEIL) power_of_two_scale(s, size, multiplier, scale);
  else {
    multiplier = splat(s.target[t]) / size;
    multiplier = where((S)(bits(multiplier) == INF), splat(s.input_max), multiplier);
    if (s.rule == POW2) {
      const V whole = floats(bits(multiplier) & INF), least = splat(0x1p-126f);
      multiplier = where(whole < least, least, whole);
    }
    multiplier = where(size == 0.f, splat(1.f), multiplier);
    scale = 1.f / multiplier;
    if (!s.has_zero) scale = where(size == 0.f, V{}, scale);
  }
  const S broken = (size != size) | (s.rule >= E4M3 ? (S)(enc != enc) : S{});
  multiplier = where(broken, nan, multiplier);
  scale = where(broken, nan, scale);
}
