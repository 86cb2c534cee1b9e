// The C interface, called through ctypes: one call quantises both operands and multiplies them.
//
// C[m, n] = sum_k A[m, k] B[n, k].  Operands are plain memory (fp32 or bf16, either axis contiguous, sizes multiples of 16
// and of their blocks: the caller checks).  Scratch memory is kept per calling thread and only grows; nothing else
// survives a call.
#include <cstdlib>
#include <initializer_list>
#include <sys/mman.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && \
    defined(__AVX512BF16__)
#include "gemm_bf16.h"

extern "C" {
struct OperandArgs {  // mirrored in backend.py
  const void* data;
  int64_t free_size, free_block, k_block;  // blocks: 0 = the whole axis
  int32_t bf16, contiguous_k, element, scale_rule, element_exponent, stochastic;
  float element_max, input_max;
  uint32_t key[2];
};
struct CallArgs {
  OperandArgs a, b;
  int64_t k;
  int32_t rotation, threads;
  const float* factors;  // of the rotation
  uint32_t counter[2];   // step, micro
};
}

namespace {
struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  ~Scratch() { free(data); }
  char* reserve(size_t bytes) {
    constexpr size_t huge = 2 << 20;
    if (bytes > size) {
      free(data);
      size = (bytes + huge - 1) / huge * huge;
      data = (char*)aligned_alloc(huge, size);
      if (!data) { size = 0; return nullptr; }
      madvise(data, size, MADV_HUGEPAGE);  // panels lie far apart: fewer address translations
    }
    return data;
  }
};
thread_local Scratch scratch;

int64_t scale_count(const OperandArgs& o, int64_t k) { return o.free_size * (o.k_block ? k / o.k_block : 1); }

size_t bytes_needed(const OperandArgs& o, int64_t k) {  // codes, then scales, starts and multipliers, each on its own lines
  return ((size_t)o.free_size * k * 2 + 3 * (size_t)scale_count(o, k) * 4 + 4 * 64 + 63) / 64 * 64;
}

// FP4 blocks that the VNNI product knows
bool small_block(const OperandArgs& o) { return o.element == 0 && (o.k_block == 16 || o.k_block == 32); }

// an operand laid out in scratch memory
Operand operand(const OperandArgs& o, const CallArgs& call, bool fp4, bool biased, char* memory) {
  auto take = [&](size_t bytes) { char* p = memory; memory += (bytes + 63) / 64 * 64; return p; };
  Operand op;
  op.source = {o.data, o.bf16 != 0, o.contiguous_k != 0, o.free_size, call.k, {call.rotation, call.factors},
               o.stochastic != 0, {{o.key[0], o.key[1]}, {call.counter[0], call.counter[1]}}};
  op.rule = {(ScaleRule)o.scale_rule, o.element_max, o.input_max, o.element_exponent, 0, 0, 0};
  op.element = o.element, op.free_block = o.free_block, op.k_block = o.k_block;
  const size_t scales = (size_t)scale_count(o, call.k) * 4;
  op.out = {fp4, biased, o.free_size, call.k, o.k_block ? o.k_block : call.k, nullptr, nullptr, nullptr, 1.f, false};
  op.out.codes = (uint32_t*)take((size_t)o.free_size * call.k * (fp4 ? 1 : 2));
  op.out.scales = (float*)take(scales);
  op.out.starts = (int32_t*)take(scales);
  op.multipliers = (float*)take(scales);
  op.allocate(call.threads);
  return op;
}

// Called by all threads of a team.
void quantise_all(std::initializer_list<Operand*> operands) {
  bool maxima = false, table = false;
  for (Operand* op : operands) maxima |= op->needs_maxima(), table |= op->needs_table();
  for (Operand* op : operands)
    if (op->needs_maxima()) op->find_maxima();
  if (maxima) {
#pragma omp barrier
  }
  for (Operand* op : operands)
    if (op->needs_table()) op->fill_table();
  if (table) {
#pragma omp barrier
  }
  for (Operand* op : operands) op->quantise();
#pragma omp barrier
}

template <class T>
void product(const CallArgs& call, T* out, char* memory) {
  const bool fp4 = small_block(call.a) && small_block(call.b);
  Operand a = operand(call.a, call, fp4, true, memory);
  Operand b = operand(call.b, call, fp4, false, memory + bytes_needed(call.a, call.k));
  auto powers_of_two = [](const Operand& o) { return o.rule.scale >= E8M0_RCEIL && o.in_tile(); };
  const bool mx = powers_of_two(a) && powers_of_two(b);
  const bool nv = a.rule.scale == E4M3_TENSOR && b.rule.scale == E4M3_TENSOR;
  a.out.folded = b.out.folded = mx && !fp4;
#pragma omp parallel num_threads(call.threads)
  {
    quantise_all({&a, &b});
    // While exponents are moderate, all partial results are normal fp32 numbers and folded codes normal bf16 ones.
    const int low_a = a.lowest_exponent(), low_b = b.lowest_exponent();
    const bool moderate =
        low_a + low_b >= -90 && a.highest_exponent() + b.highest_exponent() <= 90 && std::min(low_a, low_b) >= -100;
    if (mx && !fp4 && !moderate) {
#pragma omp barrier
#pragma omp single
      a.out.folded = b.out.folded = false;
      quantise_all({&a, &b});
    }
    const Output<T> o{out, call.b.free_size, a.out.tensor_scale * b.out.tensor_scale};
    const bool exact = nv || (mx && moderate);
    if (!fp4) multiply<Bf16Rows>(a.out, b.out, o);
    else if (b.out.block == 32 && exact) multiply<VnniRows<32, EXACT>>(a.out, b.out, o);
    else if (b.out.block == 32) multiply<VnniRows<32, LITERAL>>(a.out, b.out, o);
    else if (!exact) multiply<VnniRows<16, LITERAL>>(a.out, b.out, o);
    else if (b.free_block == 16) multiply<VnniRows<16, UNIFORM>>(a.out, b.out, o);
    else multiply<VnniRows<16, EXACT>>(a.out, b.out, o);
  }
}
}  // namespace

extern "C" {
int lowprec_supported() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl");
}

// 0, or 1 when memory is exhausted.  out: (a.free_size, b.free_size) row-major, bf16 or fp32.
int lowprec_gemm(const CallArgs* call, void* out, int out_bf16) {
  char* memory = scratch.reserve(bytes_needed(call->a, call->k) + bytes_needed(call->b, call->k));
  if (!memory) return 1;
  if (out_bf16) product(*call, (uint16_t*)out, memory);
  else product(*call, (float*)out, memory);
  return 0;
}

// What operand `a` becomes, unpacked: element values (free_size, k), scales (free_size, k / block), tensor scale ().
int lowprec_quantize(const CallArgs* call, float* values, float* scales, float* tensor_scale) {
  char* memory = scratch.reserve(bytes_needed(call->a, call->k));
  if (!memory) return 1;
  Operand op = operand(call->a, *call, small_block(call->a), false, memory);
#pragma omp parallel num_threads(call->threads)
  quantise_all({&op});
  const Packed& p = op.out;
  for (int64_t f = 0; f < p.free_size; f++) {
    for (int64_t k = 0; k < p.k; k++) {
      const uint32_t word = p.codes[((f / 16) * (p.k / p.per()) + k / p.per()) * 16 + f % 16];
      values[f * p.k + k] = p.fp4 ? (int8_t)(word >> (8 * (k % 4))) * 0.5f : bits_to_float(word >> (16 * (k % 2)) << 16);
    }
    for (int64_t g = 0; g < p.groups(); g++) scales[f * p.groups() + g] = p.scales[((f / 16) * p.groups() + g) * 16 + f % 16];
  }
  *tensor_scale = p.tensor_scale;
  return 0;
}

// 64 random 16-bit integers from 8 consecutive counters
void lowprec_philox(const uint32_t* key, const uint32_t* counter, uint64_t first, uint16_t* out_64) {
  philox64({{key[0], key[1]}, {counter[0], counter[1]}}, first, out_64);
}
}
#else
extern "C" int lowprec_supported() { return 0; }
#endif
