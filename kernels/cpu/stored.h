// A prepared operand in little memory, to be kept from the forward to the backward pass, and back.
//
// Codes take 4 bits (elements of up to 16 codes), 8 (other elements of up to 8 bits) or 16 (the rest, as packed); scales two
// bytes where bf16 holds them (E4M3, UE5M3, powers of two), else four.  Nothing is lost: restoring gives the same packed
// codes, bit for bit, but for the sign of zeros of 4-bit codes, which the int8 unit does not have either.
#pragma once
#include "packed.h"

enum StoredCodes { NIBBLES = 0, BYTES = 1, MINIFLOATS = 2, AS_PACKED = 3 };

struct StoreArgs {  // mirrored in operand.py
  void* codes;      // 4, 8, 8 or 16 bits an element, in the order of the packed operand
  void* scales;     // like Packed.block_scales, bf16 or fp32
  int32_t kind, min_exponent, mantissa, scales_bf16;
  int8_t to_index[16], to_code[16];  // NIBBLES: of a magnitude 0..15 its index; of a nibble the code with its sign
};

// int8 quads of 16 lanes <-> 4 nibbles a lane
static inline __m256i to_nibbles(I quads, I lut) {
  const I sign = _mm512_and_si512(_mm512_srli_epi32(quads, 4), splat_bits(0x08080808u));
  const I n = _mm512_or_si512(_mm512_shuffle_epi8(lut, _mm512_abs_epi8(quads)), sign);
  const I pairs = _mm512_and_si512(_mm512_or_si512(n, _mm512_srli_epi32(n, 4)), splat_bits(0x00ff00ffu));
  return _mm512_cvtepi32_epi16(_mm512_or_si512(pairs, _mm512_srli_epi32(pairs, 8)));
}
static inline I from_nibbles(__m256i packed, I lut) {
  const I x = _mm512_cvtepu16_epi32(packed);
  const I pairs = _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi32(x, 8)), splat_bits(0x00ff00ffu));
  const I n = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 4)), splat_bits(0x0f0f0f0fu));
  return _mm512_shuffle_epi8(lut, n);
}

// Element values in fp32 <-> their codes.  Scaled so that the smallest normal value is fp32's smallest, an element's bits are
// the upper ones of the fp32 pattern, subnormals included.  In two steps, 2^100 and `up` or `down`: one would overflow.
static inline I minifloat_code(V value, const StoreArgs& s, V down) {
  const I magnitude = _mm512_srli_epi32(bits(_mm512_mul_ps(_mm512_mul_ps(abs_(value), splat(0x1p-100f)), down)), 23 - s.mantissa);
  return _mm512_or_si512(magnitude, _mm512_slli_epi32(_mm512_srli_epi32(bits(value), 31), 7));
}
static inline V minifloat_value(I code, const StoreArgs& s, V up) {
  const I magnitude = _mm512_slli_epi32(_mm512_and_si512(code, splat_bits(127)), 23 - s.mantissa);
  const V value = _mm512_mul_ps(_mm512_mul_ps(from_bits(magnitude), splat(0x1p100f)), up);
  return from_bits(_mm512_or_si512(bits(value), _mm512_slli_epi32(_mm512_srli_epi32(code, 7), 31)));
}

// Called by all threads of a team.
template <bool RESTORE>
static void store_or_restore(const Packed& p, const StoreArgs& s) {
  const I to_index = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)s.to_index));
  const I to_code = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)s.to_code));
  const I bias = splat_bits(p.biased ? BIAS : 0);
  const V down = from_bits(splat_bits((uint32_t)(127 - 26 - s.min_exponent) << 23)), one = splat(1.f);
  const V up = from_bits(splat_bits((uint32_t)(127 + 26 + s.min_exponent) << 23));
  const int64_t groups = p.k / p.block_size, quads = p.k / 4;
  const bool folded = p.scales != p.block_scales;
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < p.free_size / 16; panel++) {
    for (int64_t g = 0; g < groups; g++) {
      float* scale = p.block_scales + (panel * groups + g) * 16;
      uint16_t* half = (uint16_t*)s.scales + (panel * groups + g) * 16;
      float* full = (float*)s.scales + (panel * groups + g) * 16;
      if (RESTORE) _mm512_storeu_ps(scale, s.scales_bf16 ? load16(half) : load16(full));
      else if (s.scales_bf16) store16(half, _mm512_loadu_ps(scale));
      else store16(full, _mm512_loadu_ps(scale));
      I sum{};
      const V factor = folded ? _mm512_loadu_ps(scale) : one, inverse = _mm512_div_ps(one, factor);
      for (int64_t q = g * (p.block_size / 4); q < (g + 1) * (p.block_size / 4); q++) {
        const int64_t at = (panel * quads + q) * 16;
        uint32_t* packed = p.codes + at * (p.int8 ? 1 : 2);
        uint32_t* words = (uint32_t*)s.codes + at * (s.kind == AS_PACKED && !p.int8 ? 2 : 1);
        if (s.kind == NIBBLES || s.kind == BYTES) {
          __m256i* nibbles = (__m256i*)((uint16_t*)s.codes + at);
          if (RESTORE) {
            const I codes = s.kind == NIBBLES ? from_nibbles(_mm256_loadu_si256(nibbles), to_code) : _mm512_loadu_si512(words);
            sum = _mm512_dpbusd_epi32(sum, splat_bits(BIAS), codes);
            _mm512_storeu_si512(packed, _mm512_xor_si512(codes, bias));
          } else {
            const I codes = _mm512_xor_si512(_mm512_loadu_si512(packed), bias);
            if (s.kind == NIBBLES) _mm256_storeu_si256(nibbles, to_nibbles(codes, to_index));
            else _mm512_storeu_si512(words, codes);
          }
        } else if (s.kind == AS_PACKED) {
          for (int i = 0; i < 32; i += 16) {
            if (RESTORE) _mm512_storeu_si512(packed + i, _mm512_loadu_si512(words + i));
            else _mm512_storeu_si512(words + i, _mm512_loadu_si512(packed + i));
          }
        } else if (RESTORE) {
          const I w = _mm512_loadu_si512(words);
          V v[4];
          for (int j = 0; j < 4; j++) {
            const I code = _mm512_and_si512(_mm512_srli_epi32(w, 8 * j), splat_bits(255));
            v[j] = _mm512_mul_ps(minifloat_value(code, s, up), factor);
          }
          for (int j = 0; j < 4; j += 2)
            _mm512_storeu_si512(packed + j * 8, _mm512_or_si512(_mm512_srli_epi32(bits(v[j]), 16), bits(v[j + 1])));
        } else {
          I w{};
          for (int j = 0; j < 4; j++) {
            const I pair = _mm512_loadu_si512(packed + j / 2 * 16);
            const V v = from_bits(j % 2 ? _mm512_and_si512(pair, splat_bits(0xffff0000u)) : _mm512_slli_epi32(pair, 16));
            w = _mm512_or_si512(w, _mm512_slli_epi32(minifloat_code(_mm512_mul_ps(v, inverse), s, down), 8 * j));
          }
          _mm512_storeu_si512(words, w);
        }
      }
      if (RESTORE && p.int8 && !p.biased) _mm512_storeu_si512(p.starts + (panel * groups + g) * 16, _mm512_sub_epi32(I{}, sum));
    }
    if (RESTORE && folded) _mm512_storeu_ps(p.scales + panel * 16, one);
  }
}
