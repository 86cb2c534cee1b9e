// Quantising an operand: scales, element codes, and the packed layout that the products read.
//
// The rules are those of lowprec/numerics/scale.py, operation by operation (each fp32 operation rounded once):
//   fp32   m = max / amax,  scale = 1 / m
//   e8m0   scale = 2^ceil(log2(amax / max)) (rceil) or 2^(floor(log2 amax) - floor(log2 max)) (floor)
//   e4m3   NVFP4's two levels (arXiv:2509.25149): a tensor scale, and E4M3 block scales relative to it
// A block's maximum comes from the tile at hand when the block lies inside one tile; larger blocks and tensor scales need
// a first pass over the tensor.
//
// Packed layout, the same for both operands.  16 free indices make a panel; along k, `per` neighbours share a 32-bit word:
//   codes[free/16][k/per][16]    4 x int8 of 2*value for FP4 (2*E2M1 is an integer, |.| <= 12),  2 x bf16 otherwise
//   scales[free/16][k/block][16]
#pragma once
#include <cmath>
#include <vector>

#include "tile.h"

enum ScaleRule { FP32 = 0, E4M3_TENSOR = 1, E8M0_RCEIL = 2, E8M0_FLOOR = 3 };

struct Packed {
  bool fp4;                    // int8 quads for VNNI; else bf16 pairs
  bool biased;                 // FP4 only: codes + 12, for the unsigned side of the VNNI instruction
  int64_t free_size, k, block;  // contracted elements under one scale
  uint32_t* codes;
  float* scales;
  int32_t* starts;             // FP4, unbiased side: -12 * sum of the block's codes, undoes the bias; same shape as scales
  float tensor_scale;
  bool folded;                 // the (power-of-two) scales are inside the bf16 codes, `scales` holds ones
  int64_t groups() const { return k / block; }
  int per() const { return fp4 ? 4 : 2; }
};

struct Rule {
  ScaleRule scale;
  float element_max, input_max;   // largest finite value of the element, and of the input's dtype
  int element_exponent;           // floor(log2(element_max))
  float block_encode, s_dec;      // e4m3: fl(S_enc * fl(1/max)) and 1 / S_enc
  float poison;                   // 0, or NaN when the tensor holds a NaN or an infinity (e4m3)
};

// |x| maxima (integer patterns) -> what elements are multiplied with, and the stored scale
static inline void block_scale(const Rule& rule, I amax, V& multiplier, V& scale) {
  const V a = from_bits(amax);
  const __mmask16 broken = _mm512_cmpge_epi32_mask(amax, splat_bits(INF_BITS));
  const V nan = from_bits(splat_bits(NAN_BITS));
  if (rule.scale == FP32) {
    V m = _mm512_div_ps(splat(rule.element_max), a);
    m = _mm512_mask_mov_ps(m, _mm512_cmp_ps_mask(m, splat(FLT_MAX_), _CMP_GT_OQ), splat(rule.input_max));
    m = _mm512_mask_mov_ps(m, _mm512_cmpeq_epi32_mask(amax, _mm512_setzero_si512()), splat(1.f));
    multiplier = _mm512_mask_mov_ps(m, broken, nan);
    scale = _mm512_div_ps(splat(1.f), multiplier);
  } else if (rule.scale == E4M3_TENSOR) {
    scale = _mm512_min_ps(_mm512_mul_ps(a, splat(rule.block_encode)), splat(448.f));
    scale = _mm512_add_ps(round_element<E4M3, false>(scale, I{}), splat(rule.poison));
    multiplier = _mm512_min_ps(_mm512_div_ps(splat(1.f), _mm512_mul_ps(scale, splat(rule.s_dec))), splat(FLT_MAX_));
  } else {
    I e;
    if (rule.scale == E8M0_RCEIL) {
      const I v = bits(_mm512_div_ps(a, splat(rule.element_max))), mantissa = _mm512_and_si512(v, splat_bits(0x7fffff));
      e = _mm512_srli_epi32(v, 23);
      // up unless v is a power of two; below the smallest normal, 2^-127 (0x400000) still serves
      const I floor_of = _mm512_mask_mov_epi32(I{}, _mm512_cmpeq_epi32_mask(e, I{}), splat_bits(0x400000));
      e = _mm512_mask_add_epi32(e, _mm512_cmpgt_epi32_mask(mantissa, floor_of), e, splat_bits(1));
    } else {
      e = _mm512_sub_epi32(_mm512_srli_epi32(amax, 23), splat_bits(rule.element_exponent));
    }
    e = _mm512_min_epi32(_mm512_max_epi32(e, I{}), splat_bits(254));
    auto power = [](I biased) {  // 2^(biased - 127); 2^-127 is subnormal
      const I u = _mm512_slli_epi32(biased, 23);
      return from_bits(_mm512_mask_mov_epi32(u, _mm512_cmpeq_epi32_mask(biased, I{}), splat_bits(0x400000)));
    };
    scale = _mm512_mask_mov_ps(power(e), broken, nan);
    multiplier = _mm512_mask_mov_ps(power(_mm512_sub_epi32(splat_bits(254), e)), broken, nan);
  }
}

struct alignas(64) Slot { I value; };  // 16 maxima; a thread's own lines

static uint32_t largest(I v) { return (uint32_t)_mm512_reduce_max_epi32(v); }

// 4 vectors of doubled FP4 codes along k -> one vector of int8 quads
static inline I pack_quad(const I* c) {
  const I byte = splat_bits(255);
  const I low = _mm512_or_si512(_mm512_and_si512(c[0], byte), _mm512_slli_epi32(_mm512_and_si512(c[1], byte), 8));
  return _mm512_ternarylogic_epi32(low, _mm512_slli_epi32(_mm512_and_si512(c[2], byte), 16), _mm512_slli_epi32(c[3], 24), 0xfe);
}

// `count` contracted vectors of one panel, from contracted index k: times the multiplier, rounded, packed.
// `fold` multiplies the rounded values (a power of two, or ones).  Returns the sum of the codes, times 12, for FP4.
template <class E, bool STOCHASTIC, bool FP4>
static inline I round_and_pack(const TileRow* tile, const NoiseRow* noise, int count, V multiplier, V fold, uint32_t* codes,
                               bool biased) {
  auto value = [&](int i) {
    const I random = STOCHASTIC ? _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)noise[i])) : I{};
    return round_element<E, STOCHASTIC>(_mm512_mul_ps(_mm512_load_ps(tile[i]), multiplier), random);
  };
  I sum{};
  if constexpr (FP4) {
    for (int i = 0; i < count; i += 4, codes += 16) {
      I c[4];
      for (int j = 0; j < 4; j++) {
        const V v = value(i + j);
        c[j] = _mm512_cvtps_epi32(_mm512_add_ps(v, v));
      }
      I quad = pack_quad(c);
      if (biased) quad = _mm512_add_epi8(quad, splat_bits(0x0c0c0c0c));
      else sum = _mm512_dpbusd_epi32(sum, splat_bits(0x0c0c0c0c), quad);
      _mm512_storeu_si512(codes, quad);
    }
  } else {
    for (int i = 0; i < count; i += 2, codes += 16) {
      const I low = bits(_mm512_mul_ps(value(i), fold)), high = bits(_mm512_mul_ps(value(i + 1), fold));
      _mm512_storeu_si512(codes, _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(high, splat_bits(0xffff0000u))));
    }
  }
  return sum;
}

// One operand on its way.  The methods are called by all threads of a team, with a barrier between them.
struct Operand {
  Source source;
  Rule rule;
  int element;                  // 0 e2m1, 1 e4m3, 2 e5m2
  int64_t free_block, k_block;  // 0 = the whole axis
  Packed out;
  float* multipliers;           // like out.scales, used when blocks exceed a tile
  std::vector<Slot> thread_maxima, maxima;
  std::vector<Slot> lows, highs;  // of exponents, by thread

  bool whole() const { return free_block == 0 && out.groups() == 1; }
  // A block lies inside one tile, so that its maximum is at hand when its elements are.
  bool in_tile() const { return k_block && k_block <= MAX_DEPTH && (free_block == 1 || (free_block == 16 && k_block == 16)); }
  bool needs_maxima() const { return rule.scale == E4M3_TENSOR || !in_tile(); }
  bool needs_table() const { return !in_tile() && !whole(); }
  int depth() const { return (int)std::max<int64_t>(std::max(16, source.rotation.size), in_tile() ? k_block : 16); }

  void allocate(int threads) {
    thread_maxima.assign(threads, Slot{I{}});
    lows.assign(threads, Slot{splat_bits(1000)});
    highs.assign(threads, Slot{I{}});
    if (needs_table()) maxima.resize(out.free_size / 16 * (out.k / 16));
  }

  // Step 1, if needs_maxima(): of the tensor, and of every 16 contracted elements if needs_table().
  void find_maxima() {
    I& mine = thread_maxima[omp_get_thread_num()].value;
    if (source.rotation.size || needs_table()) {
      const int depth = std::max(16, source.rotation.size);
      for_each_tile(source, depth, false, [&](const TileRow* tile, const NoiseRow*, int64_t panel, int64_t k) {
        for (int j = 0; j < depth; j += 16) {
          I m{};
          for (int i = 0; i < 16; i++) m = max_bits(m, abs_bits(_mm512_load_ps(tile[j + i])));
          mine = max_bits(mine, m);
          if (!maxima.empty()) maxima[(panel * out.k + k + j) / 16].value = m;
        }
      });
      return;
    }
    const int64_t n = out.free_size * out.k / 64;  // both sizes are multiples of 16
    I m[4] = {};
#pragma omp for schedule(dynamic, 1024) nowait
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < 4; j++)
        m[j] = max_bits(m[j], abs_bits(source.bf16 ? load16((const uint16_t*)source.data + i * 64 + j * 16)
                                                   : load16((const float*)source.data + i * 64 + j * 16)));
    mine = max_bits(max_bits(m[0], m[1]), max_bits(m[2], m[3]));
  }

  uint32_t tensor_amax() const {
    I m{};
    for (auto& slot : thread_maxima) m = max_bits(m, slot.value);
    return largest(m);
  }

  // Step 2, if needs_table(): multipliers and scales of all blocks.
  void fill_table() {
    Rule r = rule;
    if (r.scale == E4M3_TENSOR) tensor_scale(r, tensor_amax());
    const int64_t panels = out.free_size / 16, groups = out.groups(), fine = out.k / 16, wide = fine / groups;
    const int64_t tall = free_block == 0 ? panels : std::max<int64_t>(1, free_block / 16);
#pragma omp for schedule(dynamic) nowait
    for (int64_t p0 = 0; p0 < panels; p0 += tall)
      for (int64_t g = 0; g < groups; g++) {
        I m{};
        for (int64_t p = p0; p < p0 + tall; p++)
          for (int64_t j = 0; j < wide; j++) m = max_bits(m, maxima[p * fine + g * wide + j].value);
        if (free_block != 1) m = splat_bits(largest(m));
        V multiplier, scale;
        block_scale(r, m, multiplier, scale);
        for (int64_t p = p0; p < p0 + tall; p++) {
          _mm512_storeu_ps(multipliers + (p * groups + g) * 16, multiplier);
          _mm512_storeu_ps(out.scales + (p * groups + g) * 16, scale);
        }
      }
  }

  // The constants of NVFP4's tensor scale.  Every thread works them out for itself.
  static float tensor_scale(Rule& r, uint32_t amax_bits) {
    const float amax = bits_to_float(amax_bits), top = 448.f * r.element_max;
    float s_enc = top / amax;
    const bool overflow = s_enc > FLT_MAX_;
    s_enc = amax == 0 ? 1.f : std::min(s_enc, FLT_MAX_);
    r.s_dec = 1.f / s_enc;
    r.block_encode = s_enc * (1.f / r.element_max);
    r.poison = amax_bits >= INF_BITS ? bits_to_float(NAN_BITS) : 0.f;
    return r.poison + (amax == 0 ? 1.f : overflow ? r.s_dec : amax / top);
  }

  // Step 3: codes, and the scales of blocks inside a tile.
  void quantise() {
    const bool random = source.stochastic;
    if (element == 0 && out.fp4) random ? quantise_as<E2M1, true, true>() : quantise_as<E2M1, false, true>();
    else if (element == 0) random ? quantise_as<E2M1, true, false>() : quantise_as<E2M1, false, false>();
    else if (element == 1) random ? quantise_as<E4M3, true, false>() : quantise_as<E4M3, false, false>();
    else random ? quantise_as<E5M2, true, false>() : quantise_as<E5M2, false, false>();
  }

  template <class E, bool STOCHASTIC, bool FP4>
  void quantise_as() {
    Rule r = rule;
    float t = 1.f;
    V whole_multiplier{}, whole_scale = splat(1.f);
    if (r.scale == E4M3_TENSOR) t = tensor_scale(r, tensor_amax());
    if (whole()) block_scale(r, splat_bits(tensor_amax()), whole_multiplier, whole_scale);
#pragma omp single nowait
    {
      out.tensor_scale = t;
      if (whole() || out.folded)
        for (int64_t p = 0; p < out.free_size; p += 16) _mm512_storeu_ps(out.scales + p, whole_scale);
    }
    I low = splat_bits(1000), high{};
    const bool in_tile_ = in_tile(), whole_ = whole();
    const int depth_ = depth(), step = in_tile_ ? (int)k_block : 16;
    const int64_t groups = out.groups(), words = out.k / out.per();
    for_each_tile(source, depth_, STOCHASTIC, [&](const TileRow* tile, const NoiseRow* noise, int64_t panel, int64_t k0) {
      for (int k = 0; k < depth_; k += step) {
        const int64_t at = (panel * groups + (k0 + k) / out.block) * 16;
        V multiplier = whole_multiplier, scale, fold = splat(1.f);
        if (in_tile_) {
          I m{};
          for (int i = 0; i < step; i++) m = max_bits(m, abs_bits(_mm512_load_ps(tile[k + i])));
          if (free_block == 16) m = splat_bits(largest(m));
          block_scale(r, m, multiplier, scale);
          const I e = _mm512_srli_epi32(bits(scale), 23);
          const __mmask16 counts = _mm512_cmpgt_epi32_mask(m, I{}) & _mm512_cmplt_epi32_mask(m, splat_bits(INF_BITS));
          low = _mm512_mask_min_epi32(low, counts, low, e);
          high = _mm512_mask_max_epi32(high, counts, high, e);
          if (out.folded) fold = scale;
          else _mm512_storeu_ps(out.scales + at, scale);
        } else if (!whole_) {
          multiplier = _mm512_loadu_ps(multipliers + at);
        }
        uint32_t* codes = out.codes + (panel * words + (k0 + k) / out.per()) * 16;
        const I sum = round_and_pack<E, STOCHASTIC, FP4>(tile + k, noise + k, step, multiplier, fold, codes, out.biased);
        if (FP4 && !out.biased) _mm512_storeu_si512(out.starts + at, _mm512_sub_epi32(I{}, sum));
      }
    });
    lows[omp_get_thread_num()].value = low;
    highs[omp_get_thread_num()].value = high;
  }

  // Exponents of the smallest and largest in-tile scale whose block is finite and not all zero.
  int lowest_exponent() const {
    int e = 1000;
    for (auto& slot : lows) e = std::min(e, _mm512_reduce_min_epi32(slot.value));
    return e - 127;
  }
  int highest_exponent() const {
    int e = 0;
    for (auto& slot : highs) e = std::max(e, _mm512_reduce_max_epi32(slot.value));
    return e - 127;
  }
};
