// Block Hadamard rotation of a tile, in place: lowprec/numerics/hadamard.py, the same operations in the same order
// (multiply by the factors, butterflies at distance 1, 2, 4, ..., round to bf16 for bf16 tensors).
#pragma once
#include "qdq_simd.h"

struct Rotation {
  int32_t size, axis;    // 0: none, else a power of two to 128; axis of the memory: 0 down the rows, 1 along them
  const float* factors;  // (size) sign * size ** -0.5
};

template <int D> INLINE V butterfly(V x) {  // lanes j, j ^ D -> sum, difference
  U flip = {};
  for (int j = 0; j < W; j++) flip[j] = (j & D) ? SIGN : 0;
  return swapped<D>(x) + floats(bits(x) ^ flip);
}

template <int NV> INLINE void butterflies(V* v, int first = 1) {  // of NV vectors, from vector distance `first`
#pragma GCC unroll 8
  for (int h = 1; h < NV; h *= 2) {
    if (h < first) continue;
#pragma GCC unroll 16
    for (int p = 0; p < NV / 2; p++) {
      const int j = p / h * 2 * h + p % h;
      const V u = v[j], w = v[j + h];
      v[j] = u + w;
      v[j + h] = u - w;
    }
  }
}

INLINE V in_lanes(V x, int size) {
  x = butterfly<1>(x);
  if (size > 2) x = butterfly<2>(x);
  if constexpr (W > 4) if (size > 4) x = butterfly<4>(x);
  if constexpr (W > 8) if (size > 8) x = butterfly<8>(x);
  return x;
}

// NV vectors in a row: one block, or (NV = 1) the W / size blocks of one vector.
template <int NV> static void rotate_row(float* p, const float* factors, int size, bool bf16) {
  V v[NV];
#pragma GCC unroll 8
  for (int i = 0; i < NV; i++) v[i] = in_lanes(load(p + i * W) * load(factors + i * W), size);
  butterflies<NV>(v);
#pragma GCC unroll 8
  for (int i = 0; i < NV; i++) store(p + i * W, bf16 ? round_bf16(v[i]) : v[i]);
}

// N points `stride` floats apart, W columns; factors null: a later part of a block, already multiplied.
template <int N> static inline void rotate_down(float* p, int64_t stride, const float* factors, bool bf16) {
  V v[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) v[i] = factors ? load(p + i * stride) * splat(factors[i]) : load(p + i * stride);
  butterflies<N>(v);
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) store(p + i * stride, bf16 ? round_bf16(v[i]) : v[i]);
}

static void rotate_down_by(int n, float* p, int64_t stride, const float* factors, bool bf16) {
  switch (n) {
    case 2: return rotate_down<2>(p, stride, factors, bf16);
    case 4: return rotate_down<4>(p, stride, factors, bf16);
    case 8: return rotate_down<8>(p, stride, factors, bf16);
    default: return rotate_down<16>(p, stride, factors, bf16);
  }
}

// tile (rows, columns), both multiples of what the rotation needs; `factors` holds at least W floats, repeated.
static void rotate_tile(float* tile, int rows, int columns, const Rotation& r, const float* factors, bool bf16) {
  const int n = r.size;
  if (r.axis == 1) {
    const int step = n > W ? n : W;
    for (float* p = tile; p < tile + (int64_t)rows * columns; p += step) switch (step / W) {
        case 1: rotate_row<1>(p, factors, n, bf16); break;
        case 2: rotate_row<2>(p, factors, n, bf16); break;
        case 4: rotate_row<4>(p, factors, n, bf16); break;
        case 8: rotate_row<8>(p, factors, n, bf16); break;
        case 16: rotate_row<16>(p, factors, n, bf16); break;
        default: rotate_row<32>(p, factors, n, bf16);
      }
    return;
  }
  for (int i = 0; i < rows; i += n)
    for (int c = 0; c < columns; c += W) {
      float* p = tile + (int64_t)i * columns + c;
      if (n <= 16) {
        rotate_down_by(n, p, columns, r.factors, bf16);
        continue;
      }
      for (int k = 0; k < n; k += 16) rotate_down<16>(p + (int64_t)k * columns, columns, r.factors + k, false);
      for (int k = 0; k < 16; k++) rotate_down_by(n / 16, p + (int64_t)k * columns, 16 * columns, nullptr, bf16);
    }
}
