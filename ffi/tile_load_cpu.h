// The tile's first phase on the host: rows of x become words of two bf16. For tile_cpu.cc only.

#ifndef JAX_TSQ_TILE_LOAD_CPU_H_
#define JAX_TSQ_TILE_LOAD_CPU_H_

#include <cstdint>
#include <cstring>

#include "numerics.h"
#include "tile_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define JAX_TSQ_X86_LEVELS
#define JAX_TSQ_AVX2 __attribute__((target("avx2,fma")))
#define JAX_TSQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#include <immintrin.h>
#endif

// Inlined code gets the instruction set of the function it ends up in.
#define JAX_TSQ_INLINE inline __attribute__((always_inline))

namespace jax_tsq {

inline constexpr int kWords = kTileColumns / 2;  // of a row
inline constexpr int kHalf = kWords / 2;         // words of a row that hold even columns of fp8 input
inline constexpr uint32_t kHighElement = 0xFFFF0000u;
inline constexpr uint32_t kSigns = 0x80008000u;
inline constexpr uint32_t kFloatNan = 0x7FC00000u;

// The words of fp8 input hold the columns 0 and 2 of every four, then 1 and 3 of every four: so no byte has to change
// lanes. A `position` counts the low elements of a row's words, then the high ones.
JAX_TSQ_INLINE int ColumnAt(InputType type, int position) {
  const int high = position / kWords;
  const int word = position % kWords;
  if (type == InputType::kBf16) return 2 * word + high;
  return 4 * (word % kHalf) + 2 * high + word / kHalf;
}

// In all of these, rows of x are `stride` bytes apart and kTileColumns elements are read of each.

JAX_TSQ_INLINE void LoadBf16(const uint8_t* x, int64_t stride, int rows, uint32_t (*words)[kWords]) {
  for (int row = 0; row < rows; ++row) std::memcpy(words[row], x + row * stride, sizeof(words[row]));
}

// The magnitude of an fp8; `bits` has its exponent and mantissa where a float32 has them.
JAX_TSQ_INLINE float Fp8Magnitude(uint32_t bits) {
  constexpr uint32_t kRebias = 120u << 23;
  constexpr uint32_t kSmallestNormal = 1u << 23;
  const float normal = BitsFloat(bits + kRebias);
  // As if there were an implicit 1 in the smallest normal's place, which then is taken off: no float32 subnormals,
  // which many CPUs are slow with.
  const float subnormal = BitsFloat(bits + kRebias + kSmallestNormal) - 0x1p-6f;
  const float value = bits < kSmallestNormal ? subnormal : normal;
  return bits == static_cast<uint32_t>(kFp8Nan) << 20 ? BitsFloat(kFloatNan) : value;
}

// The bits of `value` rounded to bf16, which are the upper half. A NaN's mantissa must not be all ones.
JAX_TSQ_INLINE uint32_t RoundToBf16(float value) {
  const uint32_t bits = FloatBits(value);
  return bits + ((bits & 0x10000u) != 0 ? 0x8000u : 0x7FFFu);
}

JAX_TSQ_INLINE void DequantizeRow(const uint8_t* __restrict row, float input_scale, uint32_t* __restrict words) {
  if (input_scale != input_scale) input_scale = BitsFloat(kFloatNan);  // one that can be rounded
  const uint32_t negative = FloatBits(input_scale) >> 31 != 0 ? kSigns : 0;
  const float magnitude = BitsFloat(FloatBits(input_scale) & 0x7FFFFFFFu);
  for (int i = 0; i < kHalf; ++i) {
    uint32_t code;  // of four columns
    std::memcpy(&code, row + 4 * i, sizeof(code));
    const uint32_t v0 = RoundToBf16(Fp8Magnitude((code << 20) & 0x07F00000u) * magnitude);
    const uint32_t v1 = RoundToBf16(Fp8Magnitude((code << 12) & 0x07F00000u) * magnitude);
    const uint32_t v2 = RoundToBf16(Fp8Magnitude((code << 4) & 0x07F00000u) * magnitude);
    const uint32_t v3 = RoundToBf16(Fp8Magnitude((code >> 4) & 0x07F00000u) * magnitude);
    words[i] = ((v0 >> 16) | (v2 & kHighElement)) ^ ((code << 8) & kSigns) ^ negative;
    words[i + kHalf] = ((v1 >> 16) | (v3 & kHighElement)) ^ (code & kSigns) ^ negative;
  }
}

JAX_TSQ_INLINE void LoadFp8(const uint8_t* x, int64_t stride, const float* input_scales, int64_t scales_stride,
                            int rows, uint32_t (*words)[kWords]) {
  for (int row = 0; row < rows; ++row) {
    DequantizeRow(x + row * stride, input_scales[row * scales_stride], words[row]);
  }
}

#ifdef JAX_TSQ_X86_LEVELS

typedef float Floats16 __attribute__((vector_size(64)));
typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));

// Adds what a code is worth more than the table's entry for its mantissa; `code` are 16-bit lanes without sign.
JAX_TSQ_AVX512 inline __m512i LookUp(__m512i code, __m512i table) {
  const __m512i normal = _mm512_or_si512(_mm512_and_si512(code, _mm512_set1_epi16(7)), _mm512_set1_epi16(8));
  const __m512i entry = _mm512_min_epu16(code, normal);  // subnormal codes: themselves; others: 8 + mantissa
  return _mm512_add_epi16(_mm512_permutexvar_epi16(entry, table), _mm512_slli_epi16(code, 4));
}

// Like LoadFp8, at half the cost. In a row with one scale the bf16 of a code follows from that of its mantissa, by
// adding to the exponent: 16 products for each row, those of the codes 0 to 15, are enough.
JAX_TSQ_AVX512 inline void LoadFp8Avx512(const uint8_t* x, int64_t stride, const float* input_scales,
                                         int64_t scales_stride, int rows, uint32_t (*words)[kWords]) {
  const Words16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Floats16 first_codes = __builtin_convertvector(index, Floats16) * 0x1p-9f;
  const __m512i magnitude = _mm512_set1_epi16(0x7F);
  const __m512i sign = _mm512_set1_epi16(-0x8000);
  for (int row = 0; row < rows; ++row) {
    const uint8_t* codes = x + row * stride;
    const float input_scale = input_scales[row * scales_stride];
    const __m512i code = _mm512_loadu_si512(codes);
    const __m512i low = _mm512_and_si512(code, magnitude);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(code, 8), magnitude);
    const bool nan = (_mm512_cmpeq_epi16_mask(low, magnitude) | _mm512_cmpeq_epi16_mask(high, magnitude)) != 0;

    // Other scales have products that are subnormal, infinite or negative.
    if (nan || !(input_scale >= 0x1p-100f && input_scale <= 0x1p100f)) {
      DequantizeRow(codes, input_scale, words[row]);
      continue;
    }
    const Words16 bits = (Words16)(first_codes * input_scale);
    const Words16 products = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const __m256i entries = (__m256i) __builtin_convertvector(products - 16 * index, Halves16);
    const __m512i table = _mm512_castsi256_si512(entries);
    const __m512i low_sign = _mm512_and_si512(_mm512_slli_epi16(code, 8), sign);
    const __m512i high_sign = _mm512_and_si512(code, sign);
    _mm512_store_si512(words[row], _mm512_or_si512(LookUp(low, table), low_sign));
    _mm512_store_si512(words[row] + kHalf, _mm512_or_si512(LookUp(high, table), high_sign));
  }
}

#endif  // JAX_TSQ_X86_LEVELS

}  // namespace jax_tsq

#endif  // JAX_TSQ_TILE_LOAD_CPU_H_
