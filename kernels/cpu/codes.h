// An operand from codes and scales that were made before, by this process or by others: laid out, not measured or rounded.
//
// The products cannot tell it from one that Quantiser made of the numbers themselves, whichever axis is contracted.
#pragma once
#include "operand.h"

struct CodesArgs {  // mirrored in operand.py
  const uint8_t* codes;  // one an element, either axis contiguous
  const float* values;   // 256: of every code
  const float* scales;   // (free_size / free_block, k / k_block)
  const float* outer;    // tensor scales: free_size of them under level ROW, else one
  int32_t few;           // codes are below 16
};

struct Loader : Quantiser {
  const CodesArgs& given;

  Loader(const OperandArgs& a, const CodesArgs& c, Packed& p) : Quantiser(a, p), given(c) {}

  V values(const V table, int64_t index) const {
    const I codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(given.codes + index)));
    return given.few ? _mm512_permutexvar_ps(codes, table) : _mm512_i32gather_ps(codes, given.values, 4);
  }
  // tile[j] lane i: free index 16 * panel + i, contracted index k + j
  void read(int64_t panel, int64_t k, V* tile) const {
    const V table = _mm512_loadu_ps(given.values);
    const int64_t f = panel * 16;
    for (int i = 0; i < 16; i++)
      tile[i] = values(table, source.contiguous_k ? (f + i) * args.k + k : (k + i) * args.free_size + f);
    if (source.contiguous_k) transpose16(tile);
  }
  V scale_of(int64_t panel, int64_t group) const {
    const int64_t fb = args.free_block ? args.free_block : args.free_size;
    alignas(64) float lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = given.scales[(panel * 16 + i) / fb * groups() + group];
    return _mm512_load_ps(lanes);
  }

  // Called by all threads of a team.  Four panels at a time: they share cache lines where the free axis is contiguous.
  template <bool INT8>
  void load_as() {
    const Grid grid(args.element);
    const V one = splat(1.f), code_scale = splat(INT8 ? args.code_scale : 1.f);
    const int64_t panels = args.free_size / 16, words = args.k / out.per();
    alignas(64) V tile[16];
    Exponents seen;
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < panels; first += 4)
      for (int64_t k = 0; k < args.k; k += 16)
        for (int64_t panel = first; panel < std::min(first + 4, panels); panel++) {
          const int64_t at = (panel * groups() + k / block) * 16;
          const bool starts = INT8 && !out.biased;
          if (k % block == 0) {
            _mm512_storeu_ps(out.block_scales + at, scale_of(panel, k / block));
            if (starts) _mm512_storeu_si512(out.starts + at, I{});
            if (k == 0 && fold) _mm512_storeu_ps(out.scales + panel * 16, one);
          }
          const V scale = _mm512_loadu_ps(out.block_scales + at);
          read(panel, k, tile);
          I m{};
          for (int j = 0; j < 16; j++) m = max_bits(m, abs_bits(tile[j]));
          seen.add(m, scale);
          uint32_t* codes = out.codes + (panel * words + k / out.per()) * 16;
          const I sum = round_and_pack<UNROUNDED, INT8>(grid, (const TileRow*)tile, nullptr, 16, one, fold ? scale : code_scale, codes, out.biased);
          if (starts) _mm512_storeu_si512(out.starts + at, _mm512_sub_epi32(_mm512_loadu_si512(out.starts + at), sum));
        }
    if (powers() && !whole()) seen.merge(*this);
  }

  void load() {
#pragma omp parallel num_threads(args.threads)
    args.int8 ? load_as<true>() : load_as<false>();
  }
  void run() {
    out.low = 1000, out.high = -1000;
    shared_outer.scale = splat(*given.outer);
    for (size_t p = 0; p < outers.size() && args.scale.level == ROW; p++) outers[p].scale = _mm512_loadu_ps(given.outer + p * 16);
    load();
    if (fold && !moderate()) {
      fold = false;
      load();
    }
    describe();
  }
};
