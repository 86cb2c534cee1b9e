// Reading an operand: tiles of 16 free x `depth` contracted values, whichever axis is contiguous in memory.
//
// A product y[m,n] = sum_k a[m,k] b[n,k] wants, for both operands, vectors whose 16 lanes are 16 free indices and which
// follow one another along k.  Of the three products of a linear layer each tensor is needed along both axes:
//   fprop x w, dgrad dy       the contracted axis is contiguous   -> a 16x16 transpose in registers (64 shuffles)
//   dgrad w, wgrad dy x       the free axis is contiguous         -> nothing to do
// so no transposed copy is ever made.  The block Hadamard rotation (contracted axis) is then additions of whole vectors.
//
// Memory is read in strips of 16 (or `depth`) rows and 64 to 128 columns into a small buffer first: rows lie a power of
// two apart, and tiles taken straight from them would fall into the same few cache sets.
#pragma once
#include <omp.h>

#include <algorithm>

#include "philox.h"

constexpr int STRIP_FREE = 64, MAX_DEPTH = 128;

struct Rotation {
  int size, rounds;           // size 0: none; else a power of two up to 128. Two rounds are two rotations.
  const float* factors[2];    // of each round, size values: fp32(sign * size ** -0.5)
};

// Where the source lies in the matrix whose noise it draws: itself, or a part of a larger one.
struct Place {
  const int64_t* rows;  // of every row of the memory; null: 0, 1, 2, ...
  int64_t all_rows, columns, first_column;
  int64_t row(int64_t r) const { return rows ? rows[r] : r; }
};

struct Source {
  const void* data;
  bool bf16;             // else fp32
  bool contiguous_k;     // the contracted axis is the fast one
  int64_t free_size, k;  // memory is [free, k] if contiguous_k, else [k, free]
  Rotation rotation;
  PhiloxKey philox;      // of the elements' noise
  Place place;
  int64_t rows() const { return contiguous_k ? free_size : k; }
  int64_t columns() const { return contiguous_k ? k : free_size; }
};

typedef float TileRow[16];
typedef uint16_t NoiseRow[16];

struct Buffers {
  alignas(64) float values[STRIP_FREE * MAX_DEPTH];
  alignas(64) uint16_t noise[STRIP_FREE * MAX_DEPTH];
  alignas(64) float raw[16][MAX_DEPTH + 16];  // padded: the rows must not share cache sets
  alignas(64) uint16_t raw_noise[16][MAX_DEPTH + 96];  // 64 more where a row does not begin with a group of eight
};

// Rows r.. of the memory, columns c..c+width: tiles one after the other, each depth x 16.
template <class T>
static void load_strip(const Source& s, int64_t r, int64_t c, int width, int depth, Buffers& b) {
  const T* x = (const T*)s.data + r * s.columns() + c;
  const int64_t ld = s.columns();
  constexpr int LINE = 64 / sizeof(T);
  for (int i = 0; i < (s.contiguous_k ? 16 : depth); i++)
    for (int j = 0; j < width; j += LINE) _mm_prefetch((const char*)(x + i * ld + width + j), _MM_HINT_T0);
  if (!s.contiguous_k) {
    for (int k = 0; k < depth; k++)
      for (int j = 0; j < width; j += 16) _mm512_store_ps(b.values + (j * depth + k * 16), load16(x + k * ld + j));
    return;
  }
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < width; j += 16) _mm512_store_ps(b.raw[i] + j, load16(x + i * ld + j));
  for (int j = 0; j < width; j += 16) {
    V v[16];
    for (int i = 0; i < 16; i++) v[i] = _mm512_load_ps(b.raw[i] + j);
    transpose16(v);
    for (int i = 0; i < 16; i++) _mm512_store_ps(b.values + (j + i) * 16, v[i]);
  }
}

// The 16-bit numbers of `width` elements from row r, column c of the memory: where they begin in `out`.
static inline const uint16_t* row_noise(const Source& s, int64_t r, int64_t c, int width, uint16_t* out) {
  const uint64_t first = (uint64_t)(s.place.row(r) * s.place.columns + s.place.first_column + c);
  const int within = (int)(first % 8);
  for (int j = 0; j < width + within; j += 64) philox64(s.philox, (first + j) / 8, out + j);
  return out + within;
}

static void load_noise(const Source& s, int64_t r, int64_t c, int width, int depth, Buffers& b) {
  auto load = [](const uint16_t* p) { return _mm256_loadu_si256((const __m256i*)p); };
  auto store = [](uint16_t* p, __m256i x) { _mm256_store_si256((__m256i*)p, x); };
  if (!s.contiguous_k) {
    for (int k = 0; k < depth; k++) {
      const uint16_t* row = row_noise(s, r + k, c, width, b.raw_noise[k % 16]);
      for (int j = 0; j < width; j += 16) store(b.noise + (j * depth + k * 16), load(row + j));
    }
    return;
  }
  const uint16_t* rows[16];
  for (int i = 0; i < 16; i++) rows[i] = row_noise(s, r + i, c, width, b.raw_noise[i]);
  for (int j = 0; j < width; j += 32) {  // two 16x16 tiles in one transpose, as the halves of 32-bit words
    V v[16];
    for (int i = 0; i < 16; i++) {
      const I left = _mm512_cvtepu16_epi32(load(rows[i] + j)), right = _mm512_cvtepu16_epi32(load(rows[i] + j + 16));
      v[i] = from_bits(_mm512_or_si512(left, _mm512_slli_epi32(right, 16)));
    }
    transpose16(v);
    for (int i = 0; i < 16; i++) {
      store(b.noise + (j + i) * 16, _mm512_cvtepi32_epi16(bits(v[i])));
      store(b.noise + (j + 16 + i) * 16, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(v[i]), 16)));
    }
  }
}

// STAGES butterflies, distances 1, 2, 4, ..., over 2^STAGES vectors.
template <int STAGES>
static inline void butterflies(V* v) {
#pragma GCC unroll 8
  for (int stage = 0; stage < STAGES; stage++)
#pragma GCC unroll 8
    for (int pair = 0; pair < 1 << STAGES >> 1; pair++) {
      const int h = 1 << stage, j = pair / h * 2 * h + pair % h;
      const V u = v[j], w = v[j + h];
      v[j] = _mm512_add_ps(u, w);
      v[j + h] = _mm512_sub_ps(u, w);
    }
}

// One Hadamard block in place: factors, butterflies at distance 1, 2, 4, ...; rounded to bf16 for bf16 tensors.  Blocks
// of more than 16 vectors do not fit into registers: first the distances below 16, then those above, 16 columns apart.
template <int SIZE>
static inline void rotate_block(TileRow* tile, const float* factors, bool bf16) {
  constexpr int INNER = SIZE < 16 ? SIZE : 16, OUTER = SIZE / INNER;
  auto store = [&](int i, V x) { _mm512_store_ps(tile[i], bf16 ? round_bf16(x) : x); };
  for (int o = 0; o < SIZE; o += INNER) {
    V v[INNER];
#pragma GCC unroll 16
    for (int i = 0; i < INNER; i++) v[i] = _mm512_mul_ps(_mm512_load_ps(tile[o + i]), splat(factors[o + i]));
    butterflies<__builtin_ctz(INNER)>(v);
#pragma GCC unroll 16
    for (int i = 0; i < INNER; i++)
      if (OUTER == 1) store(o + i, v[i]);
      else _mm512_store_ps(tile[o + i], v[i]);
  }
  if constexpr (OUTER > 1)
    for (int i = 0; i < INNER; i++) {
      V v[OUTER];
#pragma GCC unroll 8
      for (int o = 0; o < OUTER; o++) v[o] = _mm512_load_ps(tile[o * INNER + i]);
      butterflies<__builtin_ctz(OUTER)>(v);
#pragma GCC unroll 8
      for (int o = 0; o < OUTER; o++) store(o * INNER + i, v[o]);
    }
}

static void rotate_tile(TileRow* tile, int depth, const Rotation& rotation, bool bf16) {
  for (int round = 0; round < rotation.rounds; round++) {
    const float* f = rotation.factors[round];
    for (int k = 0; k < depth; k += rotation.size) switch (rotation.size) {
        case 2: rotate_block<2>(tile + k, f, bf16); break;
        case 4: rotate_block<4>(tile + k, f, bf16); break;
        case 8: rotate_block<8>(tile + k, f, bf16); break;
        case 16: rotate_block<16>(tile + k, f, bf16); break;
        case 32: rotate_block<32>(tile + k, f, bf16); break;
        case 64: rotate_block<64>(tile + k, f, bf16); break;
        default: rotate_block<128>(tile + k, f, bf16);
      }
  }
}

// Calls visit(tile, noise, panel, k) for every tile: 16 free indices from 16*panel, `depth` contracted ones from k.
// To be called by all threads of a team, which share the strips; returns without waiting for the others.
template <class F>
static void for_each_tile(const Source& s, int depth, bool with_noise, const F& visit) {
  const int64_t step = s.contiguous_k ? 16 : depth;
  const int strip = s.contiguous_k ? std::max(depth, 64) : STRIP_FREE;
  Buffers b;
#pragma omp for schedule(dynamic) collapse(2) nowait
  for (int64_t r = 0; r < s.rows(); r += step)
    for (int64_t begin = 0; begin < s.columns(); begin += 8 * strip)
      for (int64_t c = begin; c < std::min(s.columns(), begin + 8 * strip); c += strip) {
        const int width = (int)std::min<int64_t>(strip, s.columns() - c);
        if (s.bf16) load_strip<uint16_t>(s, r, c, width, depth, b);
        else load_strip<float>(s, r, c, width, depth, b);
        if (with_noise) load_noise(s, r, c, width, depth, b);
        const int tiles = s.contiguous_k ? width / depth : width / 16;
        for (int t = 0; t < tiles; t++) {
          TileRow* tile = (TileRow*)(b.values + t * depth * 16);
          if (s.rotation.size) rotate_tile(tile, depth, s.rotation, s.bf16);
          const int64_t panel = s.contiguous_k ? r / 16 : c / 16 + t, k = s.contiguous_k ? c + t * depth : r;
          visit((const TileRow*)tile, (const NoiseRow*)(b.noise + t * depth * 16), panel, k);
        }
      }
}
