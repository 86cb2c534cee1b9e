// One tile: read, rotate, measure its blocks, round, write.
//
// The matrix is taken as it lies in memory, (rows, columns) with the columns contiguous; an operand that is a transposed
// view brings its blocks and its rotation transposed, and its result keeps the layout of its source.  So nothing is ever
// transposed: blocks that run down the rows (1 x 16 of a transposed view) are maxima of whole vectors, blocks that run
// along them a fold of W vectors at a time.
//
// A tile holds whole blocks and whole rotations, padded with zeros where the matrix ends, as fp32 in the first-level
// cache.  A block larger than a tile (a row, the tensor) cannot be measured inside it: its size comes from a pass before.
#pragma once
#include <algorithm>
#include <vector>

#include "qdq_rotate.h"
#include "qdq_round.h"

constexpr int64_t PIECE = 4 * PHILOX_STEP;  // columns of a row whose random bits are made at once
constexpr int64_t STREAM_BYTES = 8 << 20;  // results from this size on are written past the caches

enum Output { VALUES_FP32, VALUES_BF16, CODES };

struct Grid {  // one fp32 number a block of (rows, columns); 0 = the whole axis
  float* data;
  int64_t rows, columns, stride;
  int64_t at(int64_t r, int64_t c) const { return (rows ? r / rows : 0) * stride + (columns ? c / columns : 0); }
  // The numbers of n neighbouring blocks, `width` columns each, of row r from column c; the last one again at the end.
  void gather(int64_t r, int64_t c, int64_t width, int64_t n, int64_t end, float* out) const {
    const float* from = data + at(r, c);
    if (!columns) return std::fill(out, out + n, *from), void();
    const float* last = data + at(r, end - 1);
    if (columns == width && from + n - 1 <= last) return memcpy(out, from, sizeof(float) * (size_t)n), void();
    for (int64_t b = 0, within = c % columns; b < n; b++, within += width) {
      if (within >= columns) within -= columns, from++;
      out[b] = *std::min(from, last);
    }
  }
};

// Where the matrix lies in the one whose noise it draws: itself, or a part of a larger one.
struct Place {
  const int64_t* rows;  // of every row; null: 0, 1, 2, ...
  int64_t columns, first_column;
  int64_t at(int64_t r, int64_t c) const { return (rows ? rows[r] : r) * columns + first_column + c; }
};

struct Job {
  const void* x;
  void* out;
  int64_t rows, columns, block_rows, block_columns, tile_rows, tile_columns;
  int32_t bf16, output, size_given, apply_scale, apply_level, join_level, stochastic, contracted, threads;
  Element element;
  ScaleArgs scale;
  Rotation rotation;
  Philox philox;
  Place place;
  Grid sizes, scales;           // block sizes (given, or null); block scales (written, or null)
  Grid encode, level, whole;    // of the tensor: what blocks are encoded with, what multiplies values, its size
};

struct Scratch {
  std::vector<float> memory;
  float *tile, *errors, *factors, *maxima;
  float *size, *encode, *whole, *multiplier, *scale, *level, *best, *candidate_multiplier, *candidate_scale;  // a block
  float *unit_multiplier, *unit_scale, *unit_level;                                                           // a column
  U* partial;
  uint16_t* noise;
  void* row;
  PhiloxKeys keys;
  explicit Scratch(const Job& j) : keys(j.philox) {
    const int64_t t = j.tile_columns, pad = 128;
    memory.resize((size_t)(2 * j.tile_rows * (t + W) + 20 * (t + pad) + 1024));
    float* p = (float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
    auto take = [&](int64_t n) { float* at = p; p += (n + 15) & ~(int64_t)15; return at; };
    tile = take(j.tile_rows * t);
    errors = j.scale.targets > 1 ? take(j.tile_rows * (t + W)) : nullptr;
    factors = take(256);
    for (float** f : {&maxima, &size, &encode, &whole, &multiplier, &scale, &level, &best, &candidate_multiplier,
                      &candidate_scale, &unit_multiplier, &unit_scale, &unit_level})
      *f = take(t + W);
    partial = (U*)take(t + W * W);
    noise = (uint16_t*)take(t / 2 + pad);
    row = take(t);
    for (int i = 0; i < std::max(W, j.rotation.size); i++)
      factors[i] = j.rotation.size ? j.rotation.factors[i % j.rotation.size] : 0.f;
  }
};

// Rows r.. and columns c.. of the matrix as fp32, zeros beyond its ends: in `tile`, or where they lie if that will do.
template <class T> static const float* read_tile(const Job& j, int64_t r, int64_t c, float* tile, T* edge) {
  const int64_t width = std::min(j.tile_columns, j.columns - c);
  if (sizeof(T) == 4 && j.tile_rows == 1 && !j.rotation.size && width == j.tile_columns) {
    const float* from = (const float*)j.x + r * j.columns + c;
    return from;
  }
  for (int64_t i = 0; i < j.tile_rows; i++) {
    float* to = tile + i * j.tile_columns;
    if (r + i >= j.rows) {
      memset(to, 0, sizeof(float) * (size_t)j.tile_columns);
      continue;
    }
    const T* from = (const T*)j.x + (r + i) * j.columns + c;
    if (width < j.tile_columns) {
      memset(edge, 0, sizeof(T) * (size_t)j.tile_columns);
      memcpy(edge, from, sizeof(T) * (size_t)width);
      from = edge;
    }
    for (int64_t k = 0; k < j.tile_columns; k += W) store(to + k, load(from + k));
  }
  return tile;
}

// Largest magnitudes (as patterns) of each column of `rows` rows.
static void column_maxima(const float* tile, int64_t rows, int64_t columns, float* out) {
  for (int64_t k = 0; k < columns; k += W) {
    U m = bits(load(tile + k)) & MAGNITUDE;
    for (int64_t i = 1; i < rows; i++) m = largest(m, bits(load(tile + i * columns + k)) & MAGNITUDE);
    store(out + k, floats(m));
  }
}

// The largest magnitudes (as patterns) of runs of `width` of n numbers; the vectors' ends are written too.
static void block_maxima(const float* columns, int64_t n, int64_t width, U* partial, float* out) {
  const auto greater = [](U a, U b) { return largest(a, b); };
  if (width % W) {
    for (int64_t b = 0; b < n / width; b++) {
      uint32_t m = 0;
      for (int64_t k = b * width; k < (b + 1) * width; k++) m = std::max(m, as_bits(columns[k]) & MAGNITUDE);
      out[b] = as_float(m);
    }
    return;
  }
  const int64_t blocks = n / width;
  for (int64_t b = 0; b < blocks; b++) {
    U m = bits(load(columns + b * width)) & MAGNITUDE;
    for (int64_t k = W; k < width; k += W) m = largest(m, bits(load(columns + b * width + k)) & MAGNITUDE);
    partial[b] = m;
  }
  for (int64_t b = 0; b < blocks; b += W) store(out + b, floats(across(partial + b, greater)));
}

// Sizes of the blocks of one row of blocks, from r, c; NaN where a block holds NaN or infinity.
static void measure(const Job& j, int64_t r, int64_t c, const float* tile, int64_t rows, int64_t width, Scratch& s) {
  const int64_t blocks = j.tile_columns / width;
  if (j.size_given) {
    j.sizes.gather(r, c, width, blocks, j.columns, s.size);
  } else {
    if (rows > 1 || width == 1) column_maxima(tile, rows, j.tile_columns, width == 1 ? s.size : s.maxima);
    if (width != 1) block_maxima(rows > 1 ? s.maxima : tile, j.tile_columns, width, s.partial, s.size);
    for (int64_t b = 0; b < blocks; b += W) {
      const U m = bits(load(s.size + b));
      store(s.size + b, floats(m < INF ? m : splat_bits(QNAN)));
    }
  }
}

// Spread one number a block to one a column.
static const float* spread(const float* block, int64_t blocks, int64_t width, float* column) {
  for (int64_t b = 0; b < blocks; b++) std::fill(column + b * width, column + (b + 1) * width, block[b]);
  return column;
}

struct Units {
  const float *multiplier, *scale, *level;
  bool streams;  // write past the caches
};

// W elements: from fp32 to values (fp32, bf16) or codes.
template <class O, bool LEVEL, class R>
INLINE void round_vector(const R& round, V x, V multiplier, V scale, V level, const uint16_t* noise, bool streams,
                         O* to) {
  const V y = x * multiplier, a = round.magnitude(y, noise);
  if constexpr (sizeof(O) == 1) store(to, round.code(y, a));
  else {
    V v = (round.is_shifted() ? a + round.offset : a) * scale;
    if constexpr (LEVEL) v *= level;
    v = floats(bits(smallest(splat(FLT_MAX_), v)) | round.sign(y, a));
    if (streams) stream(to, v);
    else store(to, v);
  }
}

// One row of a tile; `round` is a copy, which stays in registers.  BLOCK: vectors in a block; 0: blocks of any number of
// vectors; -1: one scale a column.
template <int BLOCK, bool LEVEL, class O, class R>
INLINE void round_row(const R round, const float* from, const Units u, const uint16_t* noise, int64_t n, int64_t width,
                      O* to) {
  if constexpr (BLOCK < 0) {
    for (int64_t k = 0; k < n; k += W)
      round_vector<O, LEVEL>(round, load(from + k), load(u.multiplier + k), load(u.scale + k),
                             LEVEL ? load(u.level + k) : V{}, noise + k, u.streams, to + k);
  } else {
    const int64_t step = BLOCK ? BLOCK * W : width;
    for (int64_t k = 0, b = 0; k < n; k += step, b++) {
      const V multiplier = splat(u.multiplier[b]), scale = splat(u.scale[b]), level = LEVEL ? splat(u.level[b]) : V{};
      for (int64_t i = k; i < k + step; i += W)
        round_vector<O, LEVEL>(round, load(from + i), multiplier, scale, level, noise + i, u.streams, to + i);
    }
  }
}

template <bool LEVEL, class O, class R>
static void round_row_by(const R& round, const float* from, const Units& u, const uint16_t* noise, int64_t n,
                         int64_t width, O* to) {
  if (width % W) round_row<-1, LEVEL>(round, from, u, noise, n, width, to);
  else if (width == W) round_row<1, LEVEL>(round, from, u, noise, n, width, to);
  else if (width == 2 * W) round_row<2, LEVEL>(round, from, u, noise, n, width, to);
  else round_row<0, LEVEL>(round, from, u, noise, n, width, to);
}

template <class O, bool STOCHASTIC, Kind KIND>
static void round_rows(const Job& j, int64_t r, int64_t c, const float* tile, int64_t rows, const Units& u,
                       int64_t block_width, Scratch& s) {
  const Rounder<STOCHASTIC, KIND> round(j.element);
  const int64_t width = std::min(j.tile_columns, j.columns - c);
  // Piece by piece: reading ahead, making random bits, rounding and writing alternate, so memory is always busy.
  const int64_t unit = block_width % W ? 1 : block_width, piece = std::max(unit, PIECE / unit * unit);
  const int64_t size = j.bf16 ? 2 : 4;
  for (int64_t i = 0; i < std::min(rows, j.rows - r); i++) {
    const int64_t first = (r + i) * j.columns + c, place = j.place.at(r + i, c);
    O* to = width < j.tile_columns ? (O*)s.row : (O*)j.out + first;
    const float* from = tile + i * j.tile_columns;
    const char* next = (const char*)j.x + (first + j.tile_columns) * size;  // where the next tile lies
    for (int64_t k = 0; k < j.tile_columns; k += piece) {
      const int64_t n = std::min(piece, j.tile_columns - k), b = k / unit, at = place + k;
      const uint16_t* noise = s.noise + at % 8;
      for (int64_t l = k * size; l < (k + n) * size; l += 64) __builtin_prefetch(next + l, 0, 2);
      if (STOCHASTIC) random_bits(j.philox, s.keys, (uint64_t)at / 8, n + at % 8, s.noise);
      if (u.level) {
        const Units v{u.multiplier + b, u.scale + b, u.level + b, u.streams};
        round_row_by<true>(round, from + k, v, noise, n, block_width, to + k);
      } else {
        const Units v{u.multiplier + b, u.scale + b, nullptr, u.streams};
        round_row_by<false>(round, from + k, v, noise, n, block_width, to + k);
      }
    }
    if (width < j.tile_columns) memcpy((O*)j.out + first, to, sizeof(O) * (size_t)width);
  }
}

static void scale_blocks(const Job& j, int target, int64_t blocks, float* multiplier, float* scale, const Scratch& s) {
  for (int64_t b = 0; b < blocks; b += W) {
    V m, v;
    block_scale(j.scale, target, load(s.size + b), load(s.encode + b), m, v);
    store(multiplier + b, m);
    store(scale + b, v);
  }
}

// Whether the result is large, and every vector of it aligned.
template <class O> static bool streams(const Job& j) {
  const int64_t row_bytes = j.columns * (int64_t)sizeof(O);
  const bool aligned = row_bytes % 64 == 0 && (uintptr_t)j.out % 64 == 0 && j.columns % j.tile_columns == 0;
  return aligned && row_bytes * j.rows >= STREAM_BYTES;
}

// Sums in the order of tree_sum: of `rows` rows of n numbers into the first; of runs of `width` numbers.
static void sum_rows(float* e, int64_t rows, int64_t n, int64_t stride) {
  for (int64_t half = rows / 2; half; half /= 2)
    for (int64_t i = 0; i < half; i++)
      for (int64_t k = 0; k < n; k += W) {
        float* at = e + i * stride + k;
        store(at, load(at) + load(at + half * stride));
      }
}

static void sum_runs(float* e, int64_t n, int64_t width, float* out) {
  const int64_t blocks = n / width;
  if (width % W) {  // shorter than a vector
    for (int64_t b = 0; b < blocks; b++) {
      for (int64_t half = width / 2; half; half /= 2)
        for (int64_t i = 0; i < half; i++) e[b * width + i] += e[b * width + i + half];
      out[b] = e[b * width];
    }
    return;
  }
  V v[W];
  for (int64_t b = 0; b < blocks; b += W) {
    for (int64_t i = 0; i < W; i++) {
      float* run = e + std::min(b + i, blocks - 1) * width;
      if (b + i < blocks) sum_rows(run, width / W, W, W);
      v[i] = load(run);
    }
    store(out + b, across(v, [](V x, V y) { return x + y; }));
  }
}

// 4-over-6: every block takes the target whose values lie nearest to its elements; the first of equals.
static void choose_targets(const Job& j, int64_t r, int64_t c, const float* tile, int64_t rows, int64_t width,
                           Scratch& s) {
  const Rounder<false, ANY> round(j.element);
  const int64_t n = j.tile_columns, blocks = n / width, stride = n + W;
  const bool two_level = j.scale.rule >= E4M3;
  if (two_level) j.whole.gather(r, c, width, blocks, j.columns, s.whole);
  else std::fill(s.whole, s.whole + blocks, 1.f);
  const float *multiplier = s.unit_multiplier, *scale = s.unit_scale, *whole = s.unit_level;
  for (int target = 0; target < j.scale.targets; target++) {
    scale_blocks(j, target, blocks, s.candidate_multiplier, s.candidate_scale, s);
    spread(s.candidate_multiplier, blocks, width, s.unit_multiplier);
    spread(s.candidate_scale, blocks, width, s.unit_scale);
    spread(s.whole, blocks, width, s.unit_level);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = 0; k < n; k += W) {
        const V x = load(tile + i * n + k), y = x * load(multiplier + k), a = round.magnitude(y, nullptr);
        V v = floats(bits((round.is_shifted() ? a + round.offset : a)) | round.sign(y, a)) * load(scale + k);
        if (two_level) v = v * load(whole + k) / j.scale.unit;
        const V d = v - x;
        store(s.errors + i * stride + k, j.scale.absolute ? floats(bits(d) & MAGNITUDE) : d * d);
      }
    float* sums = s.maxima;  // free by now
    if (j.contracted == 1) {
      for (int64_t i = 0; i < rows; i++) sum_runs(s.errors + i * stride, n, width, s.errors + i * stride);
      sum_rows(s.errors, rows, blocks, stride);
      std::copy(s.errors, s.errors + blocks, sums);
    } else {
      sum_rows(s.errors, rows, n, stride);
      sum_runs(s.errors, n, width, sums);
    }
    for (int64_t b = 0; b < blocks; b++)
      if (target == 0 || sums[b] < s.best[b]) {
        s.best[b] = sums[b];
        s.multiplier[b] = s.candidate_multiplier[b];
        s.scale[b] = s.candidate_scale[b];
      }
  }
}

template <class T, class O, bool STOCHASTIC, Kind KIND>
static void quantise_tile(const Job& j, int64_t r0, int64_t c, Scratch& s) {
  const float* matrix = read_tile<T>(j, r0, c, s.tile, (T*)s.row);
  if (j.rotation.size) rotate_tile(s.tile, (int)j.tile_rows, (int)j.tile_columns, j.rotation, s.factors, sizeof(T) == 2);
  const int64_t rows = j.block_rows ? j.block_rows : j.tile_rows;
  const int64_t width = j.block_columns ? j.block_columns : j.tile_columns;
  const int64_t blocks = j.tile_columns / width;
  for (int64_t r = r0; r < std::min(r0 + j.tile_rows, j.rows); r += rows) {
    const float* tile = matrix + (r - r0) * j.tile_columns;
    measure(j, r, c, tile, rows, width, s);
    if (j.scale.rule >= E4M3) j.encode.gather(r, c, width, blocks, j.columns, s.encode);
    scale_blocks(j, 0, blocks, s.multiplier, s.scale, s);
    if (j.scale.targets > 1) choose_targets(j, r, c, tile, rows, width, s);
    const int64_t inside = (std::min(j.tile_columns, j.columns - c) + width - 1) / width;
    if (j.scales.data) memcpy(j.scales.data + j.scales.at(r, c), s.scale, sizeof(float) * (size_t)inside);
    if (!j.apply_scale) std::fill(s.scale, s.scale + blocks, 1.f);
    if (j.apply_level) j.level.gather(r, c, width, blocks, j.columns, s.level);
    if (j.join_level) {  // (scale * level) first, then the element: one factor along the contracted axis
      for (int64_t b = 0; b < blocks; b++) s.scale[b] *= s.level[b];
    }
    const bool level = j.apply_level && !j.join_level;
    Units u{s.multiplier, s.scale, level ? s.level : nullptr, streams<O>(j)};
    if (width % W) {
      u = {spread(s.multiplier, blocks, width, s.unit_multiplier), spread(s.scale, blocks, width, s.unit_scale),
           level ? spread(s.level, blocks, width, s.unit_level) : nullptr, u.streams};
    }
    round_rows<O, STOCHASTIC, KIND>(j, r, c, tile, rows, u, width, s);
  }
}

// Measure only: sizes of whole-axis or other blocks (patterns of the largest magnitude), merged into j.sizes.
template <class T> static void measure_tile(const Job& j, int64_t r0, int64_t c, Scratch& s) {
  const float* matrix = read_tile<T>(j, r0, c, s.tile, (T*)s.row);
  if (j.rotation.size) rotate_tile(s.tile, (int)j.tile_rows, (int)j.tile_columns, j.rotation, s.factors, sizeof(T) == 2);
  const int64_t rows = j.block_rows ? j.block_rows : j.tile_rows;
  const int64_t width = j.block_columns ? j.block_columns : j.tile_columns;
  for (int64_t r = r0; r < std::min(r0 + j.tile_rows, j.rows); r += rows) {
    measure(j, r, c, matrix + (r - r0) * j.tile_columns, rows, width, s);
    for (int64_t b = 0; b < j.tile_columns / width && c + b * width < j.columns; b++) {
      uint32_t* at = (uint32_t*)j.sizes.data + j.sizes.at(r, c + b * width);
      uint32_t seen = __atomic_load_n(at, __ATOMIC_RELAXED);
      const uint32_t now = as_bits(s.size[b]);
      while (now > seen && !__atomic_compare_exchange_n(at, &seen, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }
  }
}
