// Quantising an operand: sizes of blocks, scales, element codes, into the packed layout.
//
// A block's size is its largest magnitude.  It comes from the tile at hand when the block lies inside one tile; larger
// blocks and outer scales need a first pass over the tensor; other statistics (rms, mean, ...) are given by the caller.
#pragma once
#include <vector>

#include "packed.h"
#include "scale.h"
#include "tile.h"

enum Mode { ROUND_NEAREST = 0, ROUND_STOCHASTIC = 1, MS_EDEN = 2 };

struct OperandArgs {  // mirrored in operand.py
  const void* data;
  const float* sizes;   // (rows / free_block, k / k_block) sizes of blocks; null: largest magnitudes
  const float* amax;    // the size of the whole tensor, under level ROW of every row; null: its own
  const float* factors[2];
  int64_t free_size, k, free_block, k_block;  // blocks: 0 = the whole axis
  int32_t bf16, contiguous_k, mode, group, rotation, rounds, threads, int8, biased, may_fold;
  Element element;
  float code_scale;
  ScaleArgs scale;
  uint32_t key[2], scale_key[2], counter[2];
  Place place;
};

struct alignas(64) Slot { I value; };  // 16 maxima; a thread's own lines

static uint32_t largest(I v) { return (uint32_t)_mm512_reduce_max_epi32(v); }

// 4 vectors of int8 codes along k -> one vector of int8 quads
static inline I pack_quad(const I* c) {
  const I byte = splat_bits(255);
  const I low = _mm512_or_si512(_mm512_and_si512(c[0], byte), _mm512_slli_epi32(_mm512_and_si512(c[1], byte), 8));
  return _mm512_ternarylogic_epi32(low, _mm512_slli_epi32(_mm512_and_si512(c[2], byte), 16), _mm512_slli_epi32(c[3], 24), 0xfe);
}

// `count` contracted vectors of one panel: times the multiplier, rounded, packed.  `factor` multiplies the rounded values:
// the code scale of integers, else a power of two to fold in.  Returns the sum of the codes times 128, for INT8.
template <Rounding R, bool INT8>
static inline I round_and_pack(const Grid& grid, const TileRow* tile, const NoiseRow* noise, int count, V multiplier,
                               V factor, uint32_t* codes, bool biased) {
  auto value = [&](int i) {
    const I random = R == STOCHASTIC ? _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)noise[i])) : I{};
    return _mm512_mul_ps(round_to<R>(grid, _mm512_mul_ps(_mm512_load_ps(tile[i]), multiplier), random), factor);
  };
  I sum{};
  if constexpr (INT8) {
    for (int i = 0; i < count; i += 4, codes += 16) {
      I c[4];
      for (int j = 0; j < 4; j++) c[j] = _mm512_cvtps_epi32(value(i + j));
      I quad = pack_quad(c);
      if (biased) quad = _mm512_xor_si512(quad, splat_bits(BIAS));
      else sum = _mm512_dpbusd_epi32(sum, splat_bits(BIAS), quad);
      _mm512_storeu_si512(codes, quad);
    }
  } else {
    for (int i = 0; i < count; i += 2, codes += 16) {
      const I low = bits(value(i)), high = bits(value(i + 1));
      _mm512_storeu_si512(codes, _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(high, splat_bits(0xffff0000u))));
    }
  }
  return sum;
}

// One operand on its way.  The methods are called by all threads of a team, with a barrier between them.
struct Quantiser {
  const OperandArgs& args;
  Packed& out;
  Source source;
  int64_t block;             // contracted elements under one scale
  bool fold = false;         // powers of two go into the bf16 codes
  std::vector<Slot> thread_maxima, fine, lows, highs;  // fine: of every 16 contracted elements; lows, highs: exponents
  std::vector<float> multipliers;                      // like out.block_scales, where blocks exceed a tile
  std::vector<Outer> outers;                           // [panel][k / 128, or 1], where rows have their own

  Quantiser(const OperandArgs& a, Packed& p) : args(a), out(p), block(a.k_block ? a.k_block : a.k) {
    source = {a.data, a.bf16 != 0, a.contiguous_k != 0, a.free_size, a.k, {a.rotation, a.rounds, {a.factors[0], a.factors[1]}},
              {{a.key[0], a.key[1]}, {a.counter[0], a.counter[1]}}, a.place};
    thread_maxima.assign(a.threads, Slot{I{}});
    if (needs_fine()) fine.resize(a.free_size / 16 * (a.k / 16));
    if (needs_table()) multipliers.resize(a.free_size * groups());
    if (by_row()) outers.resize(a.free_size / 16 * outers_a_panel());
    fold = a.may_fold && powers() && !a.int8 && !whole();
  }
  int64_t groups() const { return args.k / block; }
  bool identity() const { return args.element.kind == ANY; }
  bool powers() const { return args.scale.kind == POW2 || args.scale.kind == E8M0; }
  bool by_row() const { return args.scale.level == ROW || args.scale.level == WIDE; }
  int64_t outers_a_panel() const { return args.scale.level == WIDE ? args.k / 128 : 1; }
  bool whole() const { return args.free_block == 0 && groups() == 1; }
  // A block lies inside one tile, so that its maximum is at hand when its elements are.
  bool in_tile() const {
    return !args.sizes && args.k_block && args.k_block <= MAX_DEPTH &&
           (args.free_block == 1 || (args.free_block == 16 && args.k_block == 16));
  }
  bool needs_maxima() const { return !identity() && (!in_tile() || by_row() || (args.scale.level == TENSOR && !args.amax)); }
  bool needs_table() const { return !in_tile() && !whole(); }
  bool needs_fine() const { return needs_table() || by_row(); }
  int depth() const {
    const int block_depth = in_tile() ? (int)args.k_block : 16, eden = args.mode == MS_EDEN ? args.group : 16;
    return std::max(std::max(16, source.rotation.size), std::max(block_depth, eden));
  }

  // Step 1, if needs_maxima(): sizes of the tensor, and of every 16 contracted elements if needs_fine().
  void find_maxima() {
    I& mine = thread_maxima[omp_get_thread_num()].value;
    if (args.sizes) {
      const int64_t fb = args.free_block ? args.free_block : args.free_size, fine_k = args.k / 16;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < args.free_size / 16; p++)
        for (int64_t j = 0; j < fine_k; j++) {
          alignas(64) float lanes[16];
          for (int i = 0; i < 16; i++) lanes[i] = args.sizes[(p * 16 + i) / fb * groups() + j * 16 / block];
          const I m = abs_bits(_mm512_load_ps(lanes));
          mine = max_bits(mine, m);
          if (!fine.empty()) fine[p * fine_k + j].value = m;
        }
      return;
    }
    if (source.rotation.size || needs_fine()) {
      const int depth = std::max(16, source.rotation.size);
      for_each_tile(source, depth, false, [&](const TileRow* tile, const NoiseRow*, int64_t panel, int64_t k) {
        for (int j = 0; j < depth; j += 16) {
          I m{};
          for (int i = 0; i < 16; i++) m = max_bits(m, abs_bits(_mm512_load_ps(tile[j + i])));
          mine = max_bits(mine, m);
          if (!fine.empty()) fine[(panel * args.k + k + j) / 16].value = m;
        }
      });
      return;
    }
    const int64_t n = args.free_size * args.k / 64;  // both sizes are multiples of 16
    I m[4] = {};
#pragma omp for schedule(dynamic, 1024) nowait
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < 4; j++)
        m[j] = max_bits(m[j], abs_bits(source.bf16 ? load16((const uint16_t*)source.data + i * 64 + j * 16)
                                                   : load16((const float*)source.data + i * 64 + j * 16)));
    mine = max_bits(max_bits(m[0], m[1]), max_bits(m[2], m[3]));
  }

  uint32_t own_size() const {
    I m{};
    for (auto& slot : thread_maxima) m = max_bits(m, slot.value);
    return largest(m);
  }
  uint32_t given_size() const { return float_to_bits(*args.amax) & ABS_MASK; }
  // The outer scale of the whole tensor.  Every thread works it out for itself.
  Outer tensor_outer() const {
    if (args.scale.level != TENSOR) return {splat(1.f), splat(1.f), splat(1.f), splat(1.f)};
    return outer_scale(args.scale, splat_bits(args.amax ? given_size() : own_size()));
  }

  // Step 2, if by_row(): outer scales of rows, or of 128 elements.
  void fill_outers() {
    const int64_t wide = outers_a_panel(), each = args.k / 16 / wide;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < args.free_size / 16 * wide; i++) {
      I m{};
      for (int64_t j = 0; j < each; j++) m = max_bits(m, fine[i * each + j].value);
      if (args.amax && args.scale.level == ROW) m = abs_bits(_mm512_loadu_ps(args.amax + i * 16));
      outers[i] = outer_scale(args.scale, m);
    }
  }

  // Step 3, if needs_table(): multipliers and scales of all blocks.
  void fill_table() {
    const int64_t panels = args.free_size / 16, fine_k = args.k / 16, wide = fine_k / groups();
    const int64_t tall = args.free_block == 0 ? panels : std::max<int64_t>(1, args.free_block / 16);
    const Outer tensor = tensor_outer();
    Exponents seen;
#pragma omp for schedule(dynamic) nowait
    for (int64_t p0 = 0; p0 < panels; p0 += tall)
      for (int64_t g = 0; g < groups(); g++) {
        I m{};
        for (int64_t p = p0; p < p0 + tall; p++)
          for (int64_t j = 0; j < wide; j++) m = max_bits(m, fine[p * fine_k + g * wide + j].value);
        if (args.free_block != 1) m = splat_bits(largest(m));
        V multiplier, scale;
        const Outer& outer = by_row() ? outers[p0 * outers_a_panel() + g * outers_a_panel() / groups()] : tensor;
        block_scale(args.scale, outer, 0, m, multiplier, scale);
        if (args.scale.level == WIDE) scale = _mm512_mul_ps(scale, outer.scale);
        seen.add(m, scale);
        for (int64_t p = p0; p < p0 + tall; p++) {
          _mm512_storeu_ps(multipliers.data() + (p * groups() + g) * 16, multiplier);
          _mm512_storeu_ps(out.block_scales + (p * groups() + g) * 16, scale);
        }
      }
    seen.merge(*this);
  }

  struct Exponents {  // of the scales of blocks that are finite and not all zero
    I low = splat_bits(1000), high{};
    void add(I size, V scale) {
      const I e = _mm512_srli_epi32(bits(scale), 23);
      const __mmask16 counts = _mm512_cmpgt_epi32_mask(size, I{}) & _mm512_cmplt_epi32_mask(size, splat_bits(INF_BITS));
      low = _mm512_mask_min_epi32(low, counts, low, e);
      high = _mm512_mask_max_epi32(high, counts, high, e);
    }
    void merge(const Quantiser& q) const {
      const int lowest = _mm512_reduce_min_epi32(low) - 127, highest = _mm512_reduce_max_epi32(high) - 127;
#pragma omp critical
      {
        q.out.low = std::min(q.out.low, lowest);
        q.out.high = std::max(q.out.high, highest);
      }
    }
  };

  // Step 4: codes, and the scales of blocks inside a tile.
  void quantise() {
    const int kind = args.element.kind;
    if (args.mode == ROUND_STOCHASTIC) args.int8 ? quantise_as<STOCHASTIC, true>() : quantise_as<STOCHASTIC, false>();
    else if (kind == MINIFLOAT) args.int8 ? quantise_as<NEAREST, true>() : quantise_as<NEAREST, false>();
    else if (kind == MIDRISE) args.int8 ? quantise_as<NEAREST_MIDRISE, true>() : quantise_as<NEAREST_MIDRISE, false>();
    else if (kind == MASKED) quantise_as<NEAREST_MASKED, false>();
    else quantise_as<UNROUNDED, false>();
  }

  template <Rounding R, bool INT8>
  void quantise_as() {
    const Grid grid(args.element);
    const Outer tensor = tensor_outer();
    V whole_multiplier = splat(1.f), whole_scale = splat(1.f);
    if (whole() && !identity()) {
      const uint32_t own = own_size(), size = args.amax && own < INF_BITS && args.scale.level != TENSOR ? given_size() : own;
      block_scale(args.scale, tensor, 0, splat_bits(size), whole_multiplier, whole_scale);
    }
#pragma omp single nowait
    if (whole() || fold)
      for (int64_t p = 0; p < args.free_size; p += 16) _mm512_storeu_ps((fold ? out.scales : out.block_scales) + p, whole_scale);
    Exponents seen;
    const bool in_tile_ = in_tile(), whole_ = whole(), fold_ = fold, powers_ = powers(), eden = args.mode == MS_EDEN, wide = args.scale.level == WIDE;
    const int depth_ = depth(), step = in_tile_ ? (int)args.k_block : 16;
    const int64_t groups_ = groups(), words = args.k / out.per(), outers_ = outers_a_panel();
    const V code_scale = splat(INT8 ? args.code_scale : 1.f);
    for_each_tile(source, depth_, R == STOCHASTIC, [&](const TileRow* tile, const NoiseRow* noise, int64_t panel, int64_t k0) {
      for (int k = 0; k < depth_; k += step) {
        const int64_t at = (panel * groups_ + (k0 + k) / block) * 16;
        V multiplier = whole_multiplier, scale, factor = code_scale;
        if (in_tile_) {
          I m{};
          for (int i = 0; i < step; i++) m = max_bits(m, abs_bits(_mm512_load_ps(tile[k + i])));
          if (args.free_block == 16) m = splat_bits(largest(m));
          const Outer& outer = outers.empty() ? tensor : outers[panel * outers_ + (wide ? (k0 + k) / 128 : 0)];
          block_scale(args.scale, outer, 0, m, multiplier, scale);
          if (args.scale.targets > 1) choose<R>(grid, tile + k, step, outer, m, multiplier, scale);
          if (powers_) seen.add(m, scale);
          if (fold_) factor = scale;
          _mm512_storeu_ps(out.block_scales + at, wide && !eden ? _mm512_mul_ps(scale, outer.scale) : scale);
        } else if (!whole_) {
          multiplier = _mm512_loadu_ps(multipliers.data() + at);
          if (fold_) factor = _mm512_loadu_ps(out.block_scales + at);
        }
        uint32_t* codes = out.codes + (panel * words + (k0 + k) / out.per()) * 16;
        const I sum = round_and_pack<R, INT8>(grid, tile + k, noise + k, step, multiplier, factor, codes, out.biased);
        if (INT8 && in_tile_ && !out.biased) _mm512_storeu_si512(out.starts + at, _mm512_sub_epi32(I{}, sum));
      }
      if (eden)
        for (int k = 0; k < depth_; k += args.group) correct<R>(grid, tile + k, panel, k0 + k);
    });
    if (in_tile_) seen.merge(*this);
  }

  // 4-over-6 (arXiv:2512.02010): of two targets for a block's maximum, the one with the smaller error; ties to the first.
  template <Rounding R>
  void choose(const Grid& grid, const TileRow* tile, int count, const Outer& outer, I size, V& multiplier, V& scale) const {
    V m, s;
    block_scale(args.scale, outer, 1, size, m, s);
    const V first = error<R>(grid, tile, count, outer, multiplier, scale), second = error<R>(grid, tile, count, outer, m, s);
    const __mmask16 better = _mm512_cmp_ps_mask(second, first, _CMP_LT_OQ);
    multiplier = _mm512_mask_mov_ps(multiplier, better, m);
    scale = _mm512_mask_mov_ps(scale, better, s);
  }

  // sum of (value - x)^2 or |value - x| over each block
  template <Rounding R>
  V error(const Grid& grid, const TileRow* tile, int count, const Outer& outer, V multiplier, V scale) const {
    V e[MAX_DEPTH];
    const V unit = splat(args.scale.unit);
    for (int i = 0; i < count; i++) {
      const V x = _mm512_load_ps(tile[i]);
      V v = _mm512_mul_ps(round_to<R>(grid, _mm512_mul_ps(x, multiplier), I{}), scale);
      if (args.scale.level != NO_LEVEL) v = _mm512_div_ps(_mm512_mul_ps(v, outer.size), unit);
      const V d = _mm512_sub_ps(v, x);
      e[i] = args.scale.mae ? abs_(d) : _mm512_mul_ps(d, d);
    }
    const V sum = tree_sum(e, count);
    return args.free_block == 16 ? tree_sum_lanes(sum) : sum;
  }

  // Number of the block at k of a panel, where noise is drawn for [panel][block][16 rows] of the whole matrix.
  int64_t first_block_in_the_whole(int64_t panel, int64_t k) const {
    const Place& p = args.place;
    if (source.contiguous_k) return p.row(panel * 16) / 16 * (p.columns / block) + (p.first_column + k) / block;
    return (p.first_column + panel * 16) / 16 * (p.all_rows / block) + p.row(k) / block;
  }

  // MS-EDEN (arXiv:2601.22813): the scales of `group` elements times S = <u, u> / <u, q>, rounded stochastically.
  template <Rounding R>
  void correct(const Grid& grid, const TileRow* tile, int64_t panel, int64_t k) const {
    V uu[MAX_DEPTH], uq[MAX_DEPTH];
    float* scales = out.block_scales + (panel * groups() + k / block) * 16;
    const int blocks = args.group / (int)block;
    const bool wide = args.scale.level == WIDE;
    for (int b = 0; b < blocks; b++) {
      // the multiplier again from the scale that was stored
      const Outer& outer = outers.empty() ? shared_outer : outers[panel * outers_a_panel() + (wide ? k / 128 : 0)];
      const V scale = _mm512_loadu_ps(scales + b * 16);
      V multiplier = _mm512_div_ps(splat(1.f), _mm512_mul_ps(scale, outer.s_dec));
      multiplier = _mm512_min_ps(multiplier, splat(FLT_MAX_));
      for (int i = b * (int)block; i < (b + 1) * (int)block; i++) {
        const V u = _mm512_mul_ps(_mm512_load_ps(tile[i]), multiplier);
        uu[i] = _mm512_mul_ps(u, u);
        uq[i] = _mm512_mul_ps(u, round_to<R>(grid, u, I{}));
      }
    }
    const V dot = tree_sum(uq, args.group);
    const __mmask16 positive = _mm512_cmp_ps_mask(dot, V{}, _CMP_GT_OQ);
    V s = _mm512_maskz_div_ps(positive, tree_sum(uu, args.group), dot);
    s = _mm512_mask_mov_ps(splat(1.f), positive & _mm512_cmp_ps_mask(s, splat(FLT_MAX_), _CMP_LE_OQ), s);
    const PhiloxKey key{{args.scale_key[0], args.scale_key[1]}, {args.counter[0], args.counter[1]}};
    const Grid scale_grid(args.scale.kind == E4M3 ? E4M3_GRID : UE5M3_GRID);
    alignas(64) uint16_t noise[64];
    const int64_t first = first_block_in_the_whole(panel, k);
    for (int b = 0; b < blocks; b++) {
      if (b % 4 == 0) philox64(key, (uint64_t)(first + b) * 2, noise);
      const I random = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(noise + b % 4 * 16)));
      const V wanted = _mm512_mul_ps(_mm512_loadu_ps(scales + b * 16), s);
      const V rounded = round_to<STOCHASTIC>(scale_grid, wanted, random);
      const V scale = _mm512_mask_mov_ps(rounded, _mm512_cmp_ps_mask(wanted, wanted, _CMP_UNORD_Q), wanted);
      const Outer& outer = outers.empty() ? shared_outer : outers[panel * outers_a_panel() + (wide ? k / 128 : 0)];
      _mm512_storeu_ps(scales + b * 16, wide ? _mm512_mul_ps(scale, outer.scale) : scale);
    }
  }

  // Step 5: what the packed operand needs besides, by one team with a barrier before.
  void finish() {
    if (args.int8 && !args.biased && !in_tile()) {
#pragma omp for schedule(static) collapse(2)
      for (int64_t p = 0; p < args.free_size / 16; p++)
        for (int64_t g = 0; g < groups(); g++) {
          I sum{};
          const uint32_t* codes = out.codes + (p * (args.k / 4) + g * block / 4) * 16;
          for (int64_t w = 0; w < block / 4; w++)
            sum = _mm512_dpbusd_epi32(sum, splat_bits(BIAS), _mm512_loadu_si512(codes + w * 16));
          _mm512_storeu_si512(out.starts + (p * groups() + g) * 16, _mm512_sub_epi32(I{}, sum));
        }
    }
  }

  // While exponents are moderate, all partial results are normal fp32 numbers and folded codes normal bf16 ones.
  bool moderate() const { return out.low >= -45 && out.high <= 45; }

  // All steps, by a team of its own.
  void run() {
    out.low = 1000, out.high = -1000;
#pragma omp parallel num_threads(args.threads)
    {
      if (needs_maxima()) {
        find_maxima();
#pragma omp barrier
      }
      if (by_row()) fill_outers();
#pragma omp single
      shared_outer = tensor_outer();
      if (needs_table()) {
        fill_table();
#pragma omp barrier
#pragma omp single
        if (!moderate()) fold = false;
      }
      quantise();
#pragma omp barrier
      if (fold && in_tile() && !moderate()) {
#pragma omp barrier
#pragma omp single
        fold = false;
        quantise();
#pragma omp barrier
      }
      finish();
    }
    describe();
  }

  void describe() {
    const int kind = args.scale.kind;
    out.block_size = block;
    out.block = fold ? args.k : block;
    if (!fold) out.scales = out.block_scales;
    out.scale_bits = powers() || kind == NO_SCALE ? 1 : kind == E4M3 || kind == UE5M3 ? 4 : 24;
    if (args.scale.level == WIDE) out.scale_bits = 24;
    if (!powers()) out.low = kind == FP32 ? -1000 : -17, out.high = kind == FP32 ? 1000 : 15;
    if (fold) out.low = out.high = 0;
    out.tensor_scale = by_row() ? bits_to_float(NAN_BITS) : _mm512_cvtss_f32(shared_outer.scale);
    if (args.scale.level == NO_LEVEL && kind == E8M0) out.tensor_scale = args.scale.guard;
    if (args.scale.level == WIDE) out.tensor_scale = 1.f;
    for (int64_t p = 0; p < args.free_size / 16; p++)
      _mm512_storeu_ps(out.outer + p * 16, args.scale.level == ROW ? outers[p].scale : splat(out.tensor_scale));
  }

  Outer shared_outer;
};
