// Vectors of W floats for any CPU: 16 lanes with AVX-512, 8 with AVX2, 4 elsewhere (SSE2, NEON).
//
// GCC's and clang's vector extensions carry most of it; the few operations where they leave speed (or the handling of
// NaN) to luck are written once per instruction set at the top.  All widths give the same bits: every lane does the
// same IEEE operations, and the only reductions are maxima, which have no order.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LOWPREC_AVX512 1
constexpr int W = 16;
#elif defined(__AVX2__)
#define LOWPREC_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
typedef float V __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef int32_t S __attribute__((vector_size(4 * W)));
typedef uint64_t L __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef uint8_t B __attribute__((vector_size(W)));

constexpr uint32_t SIGN = 0x80000000u, MAGNITUDE = 0x7fffffffu, INF = 0x7f800000u, QNAN = 0x7fc00000u;
constexpr float FLT_MAX_ = 3.402823466385288598e38f;

INLINE float as_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE uint32_t as_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE U bits(V x) { return (U)x; }
INLINE V floats(U x) { return (V)x; }

// Per instruction set.  smallest(a, b) is b where either is NaN; u32 maxima are of values below 2^31.
#if LOWPREC_AVX512
INLINE V splat(float x) { return (V)_mm512_set1_ps(x); }
INLINE U splat_bits(uint32_t x) { return (U)_mm512_set1_epi32((int)x); }
INLINE V smallest(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE U largest(U a, U b) { return (U)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE V floor_(V x) { return (V)_mm512_roundscale_ps((__m512)x, 9); }
INLINE L product32(L a, L b) { return (L)_mm512_mul_epu32((__m512i)a, (__m512i)b); }  // of the low halves
INLINE U widened(H x) { return (U)_mm512_cvtepu16_epi32((__m256i)x); }
#elif LOWPREC_AVX2
INLINE V splat(float x) { return (V)_mm256_set1_ps(x); }
INLINE U splat_bits(uint32_t x) { return (U)_mm256_set1_epi32((int)x); }
INLINE V smallest(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE U largest(U a, U b) { return (U)_mm256_max_epi32((__m256i)a, (__m256i)b); }
INLINE V floor_(V x) { return (V)_mm256_floor_ps((__m256)x); }
INLINE L product32(L a, L b) { return (L)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
INLINE U widened(H x) { return (U)_mm256_cvtepu16_epi32((__m128i)x); }
#else
INLINE V splat(float x) { return x - V{}; }
INLINE U splat_bits(uint32_t x) { return x - U{}; }
INLINE V smallest(V a, V b) { return a < b ? a : b; }
INLINE U largest(U a, U b) { return a > b ? a : b; }
INLINE V floor_(V x) {  // x in [0, 2^31)
  return __builtin_convertvector(__builtin_convertvector(x, S), V);
}
INLINE L product32(L a, L b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
INLINE U widened(H x) { return __builtin_convertvector(x, U); }
#endif

template <class T> INLINE T load_as(const void* p) { T x; memcpy(&x, p, sizeof(T)); return x; }
template <class T> INLINE void store_as(void* p, T x) { memcpy(p, &x, sizeof(T)); }
INLINE V load(const float* p) { return load_as<V>(p); }
INLINE V load(const uint16_t* p) { return floats(widened(load_as<H>(p)) << 16); }  // bf16

// fp32 -> bf16, nearest even, in the upper half of each lane; by integers, so subnormals are kept.  A NaN must have an
// empty lower half, as those of bf16 inputs and of arithmetic have.
INLINE U bf16_bits(V x) { return bits(x) + 0x7fff + ((bits(x) >> 16) & 1); }
INLINE V round_bf16(V x) { return floats(bf16_bits(x) & 0xffff0000u); }
INLINE void store(float* p, V x) { store_as(p, x); }
INLINE void store(uint16_t* p, V x) { store_as(p, __builtin_convertvector(bf16_bits(x) >> 16, H)); }
// The same past the caches, for results too large for them; p a multiple of the vector's size.
#if LOWPREC_AVX512
INLINE void stream(float* p, V x) { _mm512_stream_ps(p, (__m512)x); }
INLINE void stream(uint16_t* p, V x) {
  _mm256_stream_si256((__m256i*)p, (__m256i)__builtin_convertvector(bf16_bits(x) >> 16, H));
}
#elif LOWPREC_AVX2
INLINE void stream(float* p, V x) { _mm256_stream_ps(p, (__m256)x); }
INLINE void stream(uint16_t* p, V x) {
  _mm_stream_si128((__m128i*)p, (__m128i)__builtin_convertvector(bf16_bits(x) >> 16, H));
}
#else
template <class T> INLINE void stream(T* p, V x) { store(p, x); }
#endif
INLINE void store(uint8_t* p, U codes) { store_as(p, __builtin_convertvector(codes, B)); }

typedef std::make_integer_sequence<int, W> Lanes;
template <int D, int... J> INLINE V swap_lanes(V x, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(x, x, (J ^ D)...);
}
template <int D> INLINE V swapped(V x) { return swap_lanes<D>(x, Lanes{}); }  // lane j <- lane j ^ D

// W vectors -> one, lane j the combination of all lanes of vector j; lanes combine at distance W/2, W/4, ..., 1, which
// is the order of tree_sum (lowprec/numerics/scale.py).
template <int D, class T, class F, int... J> INLINE T fold_lanes(T a, T b, F combine, std::integer_sequence<int, J...>) {
  return combine((T)__builtin_shufflevector(a, b, ((J & D) ? W + J - D : J)...),
                 (T)__builtin_shufflevector(a, b, ((J & D) ? W + J : J + D)...));
}
template <int D = W / 2, class T, class F> INLINE T across(T* v, F combine) {
  if constexpr (D == 0) return v[0];
  else {
    for (int i = 0; i < D; i++) v[i] = fold_lanes<D>(v[i], v[i + D], combine, Lanes{});
    return across<D / 2>(v, combine);
  }
}
INLINE uint32_t maximum(U v) {
  uint32_t m = 0;
  for (int i = 0; i < W; i++) m = v[i] > m ? v[i] : m;
  return m;
}

// ---- random bits: Philox4x32-10, the counters and the order of lowprec/numerics/stream.py ----------------------------
struct Philox {
  uint32_t key[2], counter[2];  // counter: step, micro-batch
};
constexpr int PHILOX_GROUPS = W / 2, PHILOX_STEP = 8 * PHILOX_GROUPS;  // groups of eight 16-bit numbers in one vector

struct PhiloxKeys {  // of the ten rounds, in 64-bit lanes
  uint64_t first[10], second[10];
  explicit PhiloxKeys(const Philox& p) {
    for (uint32_t r = 0; r < 10; r++) {
      first[r] = p.key[0] + r * 0x9E3779B9u & 0xffffffffu;
      second[r] = p.key[1] + r * 0xBB67AE85u & 0xffffffffu;
    }
  }
};

INLINE L splat64(uint64_t x) { return L{} + x; }

INLINE void interleave(L a, L b, uint16_t* out) {
#if LOWPREC_AVX512
  store_as(out, _mm512_unpacklo_epi64((__m512i)a, (__m512i)b));
  store_as(out + 4 * PHILOX_GROUPS, _mm512_unpackhi_epi64((__m512i)a, (__m512i)b));
#elif LOWPREC_AVX2
  store_as(out, _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
  store_as(out + 4 * PHILOX_GROUPS, _mm256_unpackhi_epi64((__m256i)a, (__m256i)b));
#else
  store_as(out, L{a[0], b[0]});
  store_as(out + 4 * PHILOX_GROUPS, L{a[1], b[1]});
#endif
}

// CHAINS * PHILOX_STEP 16-bit numbers of the groups first, first + 1, ...: each 32-bit word lies in the low half of a
// 64-bit lane, where the 32 x 32 -> 64 bit product wants it.  One vector is one long chain of dependent operations.
template <int CHAINS> INLINE void philox(const Philox& p, const PhiloxKeys& keys, uint64_t first, uint16_t* out) {
  L index;  // the order that leaves the words in sequence after one interleaving
  for (int i = 0; i < PHILOX_GROUPS; i++) index[i] = (i & 1) * (PHILOX_GROUPS / 2) + i / 2;
  const L m0 = splat64(0xD2511F53u), m1 = splat64(0xCD9E8D57u);
  L x0[CHAINS], x1[CHAINS], x2[CHAINS], x3[CHAINS];
  for (int c = 0; c < CHAINS; c++) {
    x0[c] = index + (first + c * PHILOX_GROUPS);
    x1[c] = x0[c] >> 32;
    x2[c] = splat64(p.counter[0]);
    x3[c] = splat64(p.counter[1]);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; c++) {
      const L p0 = product32(x0[c], m0), p1 = product32(x2[c], m1);
      x0[c] = (p1 >> 32) ^ x1[c] ^ splat64(keys.first[round]);
      x2[c] = (p0 >> 32) ^ x3[c] ^ splat64(keys.second[round]);
      x1[c] = p1;
      x3[c] = p0;
    }
  for (int c = 0; c < CHAINS; c++)
    interleave((x0[c] & 0xffffffffu) | (x1[c] << 32), (x2[c] & 0xffffffffu) | (x3[c] << 32), out + c * PHILOX_STEP);
}

// At least n numbers; writes up to PHILOX_STEP - 1 more.
INLINE void random_bits(const Philox& p, const PhiloxKeys& keys, uint64_t first, int64_t n, uint16_t* out) {
  int64_t k = 0;
  for (; k + 3 * PHILOX_STEP < n; k += 4 * PHILOX_STEP) philox<4>(p, keys, first + (uint64_t)k / 8, out + k);
  for (; k < n; k += PHILOX_STEP) philox<1>(p, keys, first + (uint64_t)k / 8, out + k);
}
