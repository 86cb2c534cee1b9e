// Block scales: from the size of a block to what its elements are multiplied with, and the scale that is stored.
//
// The rules are those of lowprec/numerics/scale.py, operation by operation (each fp32 operation rounded once):
//   fp32, pow2     m = target / size, scale = 1 / m; pow2 floors m to a power of two
//   e8m0           scale = 2^e, e from the exponent of size / max (rceil) or of size (floor, ceil, even)
//   e4m3, ue5m3    NVFP4's two levels (arXiv:2509.25149): an outer scale of the tensor, a row or 128 elements of one, and
//                  block scales relative to it
// All work on 16 blocks at a time, one a lane.  Sizes come as integer patterns, where NaN and infinity compare greatest.
#pragma once
#include "simd.h"

enum ScaleKind { FP32 = 0, POW2 = 1, E4M3 = 2, UE5M3 = 3, E8M0 = 4, NO_SCALE = 5 };
enum ScaleRounding { NEAREST_SCALE = 0, TE_2_14 = 1, RCEIL = 2, FLOOR = 3, CEIL = 4, EVEN = 5 };
enum ZeroScale { KEEP = 0, ONE = 1, SMALLEST = 2 };
enum Level { NO_LEVEL = 0, TENSOR = 1, ROW = 2, WIDE = 3 };  // who shares an outer scale; WIDE: 1 x 128 elements

struct ScaleArgs {  // mirrored in operand.py; constants are rounded once, there, from fp64
  int32_t kind, rounding, zero, level, targets, mae;
  int32_t mantissa, max_exponent, has_zero;  // of the element
  float element_max, input_max;              // input_max: largest finite number of the tensor's dtype
  float target[2], inverse_target[2];        // what a block's maximum maps to (guard included), the candidates in order
  float largest_target, target_ratio[2];     // largest / target
  float unit;                                // tensor_max * largest target
  float guard, inverse_guard;                // e8m0: the constant outer scale, and 1 / guard
};

constexpr Element E4M3_GRID{MINIFLOAT, -6, 3, 448.f}, UE5M3_GRID{MINIFLOAT, -14, 3, 61440.f};

struct Outer {  // outer scales of 16 blocks, and what is derived from them
  V size, s_enc, s_dec, scale;
};

// Sizes of what shares the outer scale -> S_enc and its reciprocal, and the outer scale; NaN where a size is not finite.
static inline Outer outer_scale(const ScaleArgs& a, I size_bits) {
  const __mmask16 broken = _mm512_cmpge_epi32_mask(size_bits, splat_bits(INF_BITS));
  const __mmask16 zero = _mm512_cmpeq_epi32_mask(size_bits, I{});
  Outer o;
  o.size = _mm512_mask_mov_ps(from_bits(size_bits), broken, from_bits(splat_bits(NAN_BITS)));
  const V raw = _mm512_div_ps(splat(a.unit), o.size);
  const __mmask16 overflow = _mm512_cmp_ps_mask(raw, splat(FLT_MAX_), _CMP_GT_OQ);
  o.s_enc = _mm512_mask_mov_ps(raw, overflow, splat(FLT_MAX_));
  o.s_enc = _mm512_mask_mov_ps(o.s_enc, zero, splat(1.f));
  o.s_dec = _mm512_div_ps(splat(1.f), o.s_enc);
  o.scale = _mm512_mask_mov_ps(_mm512_div_ps(o.size, splat(a.unit)), overflow, o.s_dec);
  o.scale = _mm512_mask_mov_ps(o.scale, zero, splat(1.f));
  return o;
}

// t[0] + ... + t[n-1] in the order that numerics defines: t[:n/2] + t[n/2:], again and again
static inline V tree_sum(V* t, int n) {
  for (n /= 2; n; n /= 2)
    for (int i = 0; i < n; i++) t[i] = _mm512_add_ps(t[i], t[i + n]);
  return t[0];
}

// The same over the 16 lanes, in every lane of the result.
static inline V tree_sum_lanes(V v) {
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4e));
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
  return _mm512_permutexvar_ps(I{}, v);
}

static inline V power_of_two(I biased) {  // 2^(biased - 127); 2^-127 is subnormal
  const I u = _mm512_slli_epi32(biased, 23);
  return from_bits(_mm512_mask_mov_epi32(u, _mm512_cmpeq_epi32_mask(biased, I{}), splat_bits(0x400000)));
}

// Nearest E4M3 or UE5M3 number; keeps NaN.
static inline V round_scale(int kind, V wanted) {
  const V rounded = round_to<NEAREST>(Grid(kind == E4M3 ? E4M3_GRID : UE5M3_GRID), wanted, I{});
  return _mm512_mask_mov_ps(rounded, _mm512_cmp_ps_mask(wanted, wanted, _CMP_UNORD_Q), wanted);
}

// Sizes of 16 blocks (integer patterns) -> multiplier and stored scale, for one of the targets.
static inline void block_scale(const ScaleArgs& a, const Outer& outer, int target, I size_bits, V& multiplier, V& scale) {
  const __mmask16 broken = _mm512_cmpge_epi32_mask(size_bits, splat_bits(INF_BITS));
  const __mmask16 zero = _mm512_cmpeq_epi32_mask(size_bits, I{});
  const V nan = from_bits(splat_bits(NAN_BITS)), size = _mm512_mask_mov_ps(from_bits(size_bits), broken, nan);
  if (a.kind == E4M3 || a.kind == UE5M3) {
    V wanted;
    if (a.rounding == TE_2_14) {
      wanted = _mm512_mul_ps(_mm512_div_ps(size, splat(a.largest_target)), outer.s_enc);
      if (a.target_ratio[target] != 1.f) wanted = _mm512_mul_ps(wanted, splat(a.target_ratio[target]));
    } else {
      wanted = _mm512_mul_ps(size, _mm512_mul_ps(outer.s_enc, splat(a.inverse_target[target])));
    }
    scale = round_scale(a.kind, wanted);
    if (a.zero != KEEP) {
      const V filler = splat(a.zero == ONE ? 1.f : a.kind == E4M3 ? 0x1p-9f : 0x1p-17f);
      scale = _mm512_mask_mov_ps(scale, _mm512_cmp_ps_mask(scale, V{}, _CMP_EQ_OQ), filler);
    }
    const V m = _mm512_div_ps(splat(1.f), _mm512_mul_ps(scale, outer.s_dec));
    multiplier = _mm512_min_ps(m, splat(FLT_MAX_));
    return;
  }
  if (a.kind == FP32 || a.kind == POW2) {
    V m = _mm512_div_ps(splat(a.target[target]), size);
    m = _mm512_mask_mov_ps(m, _mm512_cmp_ps_mask(m, splat(FLT_MAX_), _CMP_GT_OQ), splat(a.input_max));
    if (a.kind == POW2) m = _mm512_max_ps(from_bits(_mm512_and_si512(bits(m), splat_bits(INF_BITS))), splat(0x1p-126f));
    m = _mm512_mask_mov_ps(m, zero, splat(1.f));
    multiplier = _mm512_mask_mov_ps(m, broken, nan);
    scale = _mm512_div_ps(splat(1.f), multiplier);
    if (!a.has_zero) {  // no code stands for zero, so the scale itself must vanish with the block
      const __mmask16 tiny = _mm512_cmp_ps_mask(size, splat(a.target[target] * 0x1p-126f), _CMP_LT_OQ);
      scale = _mm512_mask_div_ps(scale, tiny, size, splat(a.target[target]));
    }
    return;
  }
  I e{};
  if (a.kind == NO_SCALE) {
    e = splat_bits(127);
  } else if (a.rounding == RCEIL) {
    const I v = bits(_mm512_div_ps(size, splat(a.element_max))), mantissa = _mm512_and_si512(v, splat_bits(0x7fffff));
    e = _mm512_srli_epi32(v, 23);
    // up unless v is a power of two; below the smallest normal, 2^-127 (0x400000) still serves
    const I floor_of = _mm512_mask_mov_epi32(I{}, _mm512_cmpeq_epi32_mask(e, I{}), splat_bits(0x400000));
    e = _mm512_mask_add_epi32(e, _mm512_cmpgt_epi32_mask(mantissa, floor_of), e, splat_bits(1));
  } else {
    const I v = a.rounding == EVEN ? _mm512_add_epi32(size_bits, splat_bits(1u << (22 - a.mantissa))) : size_bits;
    e = _mm512_sub_epi32(_mm512_srli_epi32(v, 23), splat_bits(a.max_exponent));
    if (a.rounding == CEIL) e = _mm512_mask_add_epi32(e, _mm512_test_epi32_mask(v, splat_bits(0x7fffff)), e, splat_bits(1));
  }
  e = _mm512_min_epi32(_mm512_max_epi32(e, I{}), splat_bits(254));
  V m = power_of_two(_mm512_sub_epi32(splat_bits(254), e));
  if (a.kind == E8M0 && a.guard != 1.f) m = _mm512_mul_ps(m, splat(a.inverse_guard));
  scale = _mm512_mask_mov_ps(power_of_two(e), broken, nan);
  multiplier = _mm512_mask_mov_ps(m, broken, nan);
}
