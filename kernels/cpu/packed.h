// A prepared operand: element codes and scales in the order in which the products read them.
//
// 16 free indices make a panel; along k, `per` neighbours share a 32-bit word:
//   codes[free/16][k/per][16]      4 x int8 of code_scale * value if INT8 (2 * E2M1 is an integer), else 2 x bf16 values
//   scales[free/16][k/block][16]   block scales
//   starts[free/16][k/block][16]   INT8, side b: -128 * sum of the block's codes, undoes the bias of side a
//   outer[free]                    tensor (or row) scales; they multiply the finished product
// Side a of an INT8 product is stored as code + 128, because the instruction multiplies unsigned by signed bytes.
#pragma once
#include <algorithm>

#include "simd.h"

struct Packed {  // mirrored in operand.py; the memory is the caller's
  uint32_t* codes;
  float* scales;        // as the products read them
  float* block_scales;  // the same; or, where they are folded into the codes (powers of two), what they were: `scales` are ones
  int32_t* starts;
  float* outer;
  int64_t free_size, k, block;  // contracted elements under one of `scales`
  int64_t block_size;           // ... under one of `block_scales`
  int32_t int8, biased, uniform;  // uniform: one scale for all 16 lanes of a panel
  int32_t scale_bits, low, high;  // significant bits of the scales, and the exponents between which they lie
  float code_scale, code_max;     // INT8: codes are integers, code_scale * value, of at most code_max
  float tensor_scale;             // the outer scale, if all have the same; else NaN
  int64_t groups() const { return k / block; }
  int per() const { return int8 ? 4 : 2; }
};

constexpr uint32_t BIAS = 0x80808080u;

// Values of 16 contracted elements from `k` of one panel: v[j] lane i is row i, contracted index k + j.
static inline void unpack16(const Packed& p, int64_t panel, int64_t k, V* v) {
  const uint32_t* word = p.codes + (panel * (p.k / p.per()) + k / p.per()) * 16;
  if (!p.int8) {
    for (int j = 0; j < 16; j += 2, word += 16) {
      const I w = _mm512_loadu_si512(word);
      v[j] = from_bits(_mm512_slli_epi32(w, 16));
      v[j + 1] = from_bits(_mm512_and_si512(w, splat_bits(0xffff0000u)));
    }
    return;
  }
  const V value_of_one = splat(1.f / p.code_scale);
  for (int j = 0; j < 16; j += 4, word += 16) {
    const I w = _mm512_xor_si512(_mm512_loadu_si512(word), splat_bits(p.biased ? BIAS : 0));
    for (int b = 0; b < 4; b++)
      v[j + b] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w, 24 - 8 * b), 24)), value_of_one);
  }
}

// Values * block scales as a matrix: out[free, k], or out[k, free] if `transposed`, one rounding to T.
template <class T>
static void dequantise(const Packed& p, T* out, bool transposed) {
  const int64_t panels = p.free_size / 16;
  const int64_t width = transposed ? 16 : 128;  // contracted elements a task takes of a panel
#pragma omp for schedule(static) collapse(2)
  for (int64_t outer_index = 0; outer_index < (transposed ? p.k / 16 : panels); outer_index++)
    for (int64_t inner = 0; inner < (transposed ? panels : (p.k + width - 1) / width); inner++) {
      const int64_t panel = transposed ? inner : outer_index, first = transposed ? outer_index * 16 : inner * width;
      for (int64_t k = first; k < std::min(first + width, p.k); k += 16) {
        V v[16];
        unpack16(p, panel, k, v);
        const V scale = _mm512_loadu_ps(p.scales + (panel * p.groups() + k / p.block) * 16);
        for (int j = 0; j < 16; j++) v[j] = _mm512_mul_ps(v[j], scale);
        if (!transposed) transpose16(v);
        for (int j = 0; j < 16; j++)
          store16(transposed ? out + (k + j) * p.free_size + panel * 16 : out + (panel * 16 + j) * p.k + k, v[j]);
      }
    }
}

// INT8 codes as bf16 values, for a partner that has no integers.  `out` has its own codes and shares the rest.
static void to_bf16(const Packed& p, const Packed& out) {
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < p.free_size / 16; panel++)
    for (int64_t k = 0; k < p.k; k += 16) {
      V v[16];
      unpack16(p, panel, k, v);
      uint32_t* word = out.codes + (panel * (p.k / 2) + k / 2) * 16;
      for (int j = 0; j < 16; j += 2, word += 16)
        _mm512_storeu_si512(word, _mm512_or_si512(_mm512_srli_epi32(bits(v[j]), 16), bits(v[j + 1])));
    }
}
