// The tile for CPUs with AVX-512 VBMI, which find any of 128 bytes for each of 64 elements in one instruction.
//
// A bf16 is a sign, an exponent and 7 bits of mantissa. The quant scale of a column is 448 / amax, so its own mantissa
// follows from that of amax, and with it the code of every element that has amax's exponent: 128 codes, for each of 128
// mantissas of amax. An exponent that is smaller by one makes a code smaller by 8, as long as it is no subnormal:
//
//     code = codes[mantissa of amax][mantissa] - 8 * (exponent of amax - exponent)
//
// Rows of x are split into one byte of sign and mantissa and one of exponent, bytes are transposed, and tokens of a
// column are looked up together. Subnormal codes, about one in 10,000 elements of normal data, are done in float32.
// What the formula cannot do is left to the AVX2 tile: infinities, NaNs, tiny maxima, columns at the edge.

#include <algorithm>
#include <cstring>

#include "level_cpu.h"
#include "tile_cpu.h"

namespace jax_tsq {

#ifdef JAX_TSQ_X86_LEVELS

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics of GCC 12
#endif

namespace {

constexpr int kLane = 16;    // bytes: as many columns are transposed together
constexpr int kVector = 64;  // bytes: as many tokens of each
static_assert(kTileColumns == kVector);

// Codes are tabled and subtracted from with this on top: what remains is 0 for code 0, and 1 to kSubnormals for those
// whose code the formula does not give.
constexpr int kAboveZero = 25;
constexpr int kSubnormals = kAboveZero + 7;
// Biased. Elements that are smaller by as many powers of two, and so all bf16 subnormals, have code 0.
constexpr int kLeastExponent = 20;
constexpr uint16_t kBf16Infinity = 0x7F80;

struct CodeTable {
  alignas(kVector) uint8_t codes[2][128][128];  // pow_2_scales, mantissa of amax, mantissa

  CodeTable() {
    for (int pow_2_scales = 0; pow_2_scales < 2; ++pow_2_scales) {
      for (uint32_t amax = 0; amax < 128; ++amax) {
        const float quant_scale = QuantScale(BitsFloat(0x3F800000u | amax << 16), pow_2_scales != 0);
        for (uint32_t mantissa = 0; mantissa < 128; ++mantissa) {
          codes[pow_2_scales][amax][mantissa] =
              static_cast<uint8_t>(Fp8Code<Portable>(0x3F800000u | mantissa << 16, quant_scale) + kAboveZero);
        }
      }
    }
  }
};

// The tile between phases.
struct Scratch {
  alignas(kVector) uint8_t mantissas[kBlock][kTileColumns];  // and the sign above
  alignas(kVector) uint8_t exponents[kBlock][kTileColumns];
  alignas(kVector) uint16_t amax[kTileColumns];  // bf16 bits
  alignas(kVector) float quant_scales[kTileColumns];
  alignas(kVector) uint8_t amax_exponents[kTileColumns];
  const uint8_t* codes[kTileColumns];
};

using Floats16 __attribute__((vector_size(64))) = float;
using Words16 __attribute__((vector_size(64))) = uint32_t;

// Bits of `a` where `mask` has ones, of `b` elsewhere.
JAX_TSQ_AVX512 JAX_TSQ_INLINE __m512i Select(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xCA);
}

// Load, and block maxima. Rows are `stride` bytes apart.

JAX_TSQ_AVX512 JAX_TSQ_INLINE void LoadBf16(const uint8_t* x, int64_t stride, int rows, Prefetch& prefetch,
                                            Scratch& s) {
  alignas(kVector) uint8_t low_bytes[kVector], high_bytes[kVector];
  for (int i = 0; i < kVector; ++i) {
    low_bytes[i] = static_cast<uint8_t>(2 * i);
    high_bytes[i] = static_cast<uint8_t>(2 * i + 1);
  }
  const __m512i low = _mm512_load_si512(low_bytes);
  const __m512i high = _mm512_load_si512(high_bytes);
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  const __m512i sign = _mm512_set1_epi8(-0x80);
  const __m512i minus_one = _mm512_set1_epi8(-1);
  __m512i amax0 = _mm512_setzero_si512();
  __m512i amax1 = _mm512_setzero_si512();
  for (int row = 0; row < rows; ++row) {
    prefetch.Fetch();
    const __m512i x0 = _mm512_loadu_si512(x + row * stride);
    const __m512i x1 = _mm512_loadu_si512(x + row * stride + kVector);
    amax0 = _mm512_max_epu16(amax0, _mm512_and_si512(x0, magnitude));
    amax1 = _mm512_max_epu16(amax1, _mm512_and_si512(x1, magnitude));
    const __m512i lows = _mm512_permutex2var_epi8(x0, low, x1);
    const __m512i highs = _mm512_permutex2var_epi8(x0, high, x1);
    const __m512i even = _mm512_add_epi8(highs, highs);
    const __m512i exponents = _mm512_mask_sub_epi8(even, _mm512_movepi8_mask(lows), even, minus_one);
    _mm512_store_si512(s.exponents[row], exponents);
    _mm512_store_si512(s.mantissas[row], Select(sign, highs, lows));
  }
  _mm512_store_si512(s.amax, amax0);
  _mm512_store_si512(s.amax + kVector / 2, amax1);
}

// The bf16 of a code, times its row's scale, follows from that of its mantissa, by adding to the exponent: 16 products
// for each row, those of the codes 0 to 15, are enough. Returns whether that was true: no NaN and no awkward scale.
JAX_TSQ_AVX512 JAX_TSQ_INLINE bool LoadFp8(const uint8_t* x, int64_t stride, const float* input_scales,
                                           int64_t scales_stride, int rows, Prefetch& prefetch, Scratch& s) {
  const Words16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Floats16 first_codes = __builtin_convertvector(index, Floats16) * 0x1p-9f;
  const __m512i magnitude = _mm512_set1_epi8(0x7F);
  const __m512i normal = _mm512_set1_epi8(8);
  const __m512i mantissa_bits = _mm512_set1_epi8(7);
  const __m512i exponent_bits = _mm512_set1_epi8(15);
  __m512i amax0 = _mm512_setzero_si512();
  __m512i amax1 = _mm512_setzero_si512();
  __m512i largest = _mm512_setzero_si512();
  bool usable = true;
  for (int row = 0; row < rows; ++row) {
    prefetch.Fetch();
    const float input_scale = input_scales[row * scales_stride];
    // Others have products that are subnormal, infinite or negative.
    usable &= input_scale >= 0x1p-100f && input_scale <= 0x1p100f;
    const Words16 bits = (Words16)(first_codes * input_scale);
    const Words16 products = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // rounded to bf16
    const __m128i mantissa_table = _mm512_cvtepi32_epi8((__m512i)(products & 0x7F));
    const __m128i exponent_table = _mm512_cvtepi32_epi8((__m512i)((products >> 7) - (index >> 3)));

    const __m512i signs = _mm512_loadu_si512(x + row * stride);
    const __m512i code = _mm512_and_si512(signs, magnitude);
    largest = _mm512_max_epu8(largest, code);
    // Subnormal codes: themselves. Others: 8 + mantissa.
    const __m512i entry = _mm512_min_epu8(code, _mm512_ternarylogic_epi32(code, mantissa_bits, normal, 0xEA));
    const __m512i mantissas = _mm512_permutexvar_epi8(entry, _mm512_castsi128_si512(mantissa_table));
    const __m512i exponents = _mm512_add_epi8(_mm512_permutexvar_epi8(entry, _mm512_castsi128_si512(exponent_table)),
                                              _mm512_and_si512(_mm512_srli_epi16(code, 3), exponent_bits));
    _mm512_store_si512(s.exponents[row], exponents);
    _mm512_store_si512(s.mantissas[row], Select(magnitude, mantissas, signs));
    const __m512i shifted = _mm512_add_epi8(mantissas, mantissas);
    amax0 = _mm512_max_epu16(amax0, _mm512_unpacklo_epi8(shifted, exponents));
    amax1 = _mm512_max_epu16(amax1, _mm512_unpackhi_epi8(shifted, exponents));
  }
  const __m512i first_columns = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i last_columns = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_store_si512(s.amax, _mm512_srli_epi16(_mm512_permutex2var_epi64(amax0, first_columns, amax1), 1));
  _mm512_store_si512(s.amax + kVector / 2, _mm512_srli_epi16(_mm512_permutex2var_epi64(amax0, last_columns, amax1), 1));
  return usable && _mm512_cmpeq_epi8_mask(largest, magnitude) == 0;
}

// Scales.

// Returns whether the codes of all columns are in the table.
JAX_TSQ_AVX512 JAX_TSQ_INLINE bool FindScales(bool pow_2_scales, Scratch& s, float* dequant_scales) {
  static const CodeTable table;
  alignas(kVector) static const uint8_t zeros[128] = {};
  bool usable = true;
  for (int i = 0; i < kTileColumns; ++i) {
    usable &= s.amax[i] < kBf16Infinity && (s.amax[i] == 0 || s.amax[i] >= kLeastExponent << 7);
  }
  if (!usable) return false;
  for (int i = 0; i < kTileColumns; ++i) {
    const float quant_scale = QuantScale(BitsFloat(uint32_t{s.amax[i]} << 16), pow_2_scales);
    s.quant_scales[i] = quant_scale;
    dequant_scales[i] = 1.0f / quant_scale;
    s.amax_exponents[i] = static_cast<uint8_t>(s.amax[i] >> 7);
  }
  for (int i = 0; i < kTileColumns; ++i) {
    s.codes[i] = s.amax[i] == 0 ? zeros : table.codes[pow_2_scales][s.amax[i] & 0x7F];
  }
  return true;
}

// Transpose.

// 16 columns of 16 rows in each 128-bit lane, which starts 16 rows after the lane before.
JAX_TSQ_AVX512 JAX_TSQ_INLINE __m512i LoadLanes(const uint8_t* bytes) {
  constexpr int kNextLane = kLane * kTileColumns;
  const auto* lane = reinterpret_cast<const __m128i*>(bytes);
  __m512i lanes = _mm512_castsi128_si512(_mm_load_si128(lane));
  lanes = _mm512_inserti32x4(lanes, _mm_load_si128(lane + kNextLane / kLane), 1);
  lanes = _mm512_inserti32x4(lanes, _mm_load_si128(lane + 2 * kNextLane / kLane), 2);
  return _mm512_inserti32x4(lanes, _mm_load_si128(lane + 3 * kNextLane / kLane), 3);
}

// Vectors are rows before, columns after.
JAX_TSQ_AVX512 JAX_TSQ_INLINE void Transpose(__m512i (&vectors)[kLane]) {
  __m512i next[kLane];
  for (int step = 1; step < kLane; step *= 2) {
    for (int i = 0; i < kLane / 2; ++i) {
      next[2 * i] = _mm512_unpacklo_epi8(vectors[i], vectors[i + kLane / 2]);
      next[2 * i + 1] = _mm512_unpackhi_epi8(vectors[i], vectors[i + kLane / 2]);
    }
    std::copy(next, next + kLane, vectors);
  }
}

// Quantize.

// The codes of 64 tokens, some of them subnormal; `below` has 8 * (exponent of amax - exponent).
JAX_TSQ_AVX512 __attribute__((noinline)) __m512i ComputeCodes(__m512i mantissas, __m512i below, int amax_exponent,
                                                              float quant_scale) {
  alignas(kVector) uint8_t mantissa[kVector], distance[kVector], code[kVector];
  _mm512_store_si512(mantissa, mantissas);
  _mm512_store_si512(distance, below);
  for (int i = 0; i < kVector; ++i) {
    const uint32_t exponent = static_cast<uint32_t>(amax_exponent - distance[i] / 8);
    code[i] = static_cast<uint8_t>(Fp8Code<Fused>(exponent << 23 | (mantissa[i] & 0x7Fu) << 16, quant_scale));
  }
  return _mm512_load_si512(code);
}

JAX_TSQ_AVX512 JAX_TSQ_INLINE __m512i Quantize(const Scratch& s, int column, __m512i mantissas, __m512i below) {
  const uint8_t* codes = s.codes[column];
  const __m512i largest = _mm512_permutex2var_epi8(_mm512_load_si512(codes), mantissas, _mm512_load_si512(codes + 64));
  const __m512i above = _mm512_subs_epu8(largest, below);
  __m512i code = _mm512_subs_epu8(above, _mm512_set1_epi8(kAboveZero));
  const __m512i minus_one = _mm512_set1_epi8(-1);
  if (_mm512_cmplt_epu8_mask(_mm512_add_epi8(above, minus_one), _mm512_set1_epi8(kSubnormals)) != 0) {
    code = ComputeCodes(mantissas, below, s.amax_exponents[column], s.quant_scales[column]);
  }
  return Select(_mm512_set1_epi8(-0x80), mantissas, code);
}

// Store.

JAX_TSQ_AVX512 JAX_TSQ_INLINE void StoreTokens(__m512i values, int tokens, bool streaming, uint8_t* out) {
  if (tokens < kVector) {
    if (tokens > 0) _mm512_mask_storeu_epi8(out, (uint64_t{1} << tokens) - 1, values);
  } else if (streaming && reinterpret_cast<uintptr_t>(out) % kVector == 0) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), values);
  } else {
    _mm512_storeu_si512(out, values);
  }
}

// All phases.

JAX_TSQ_AVX512 void QuantizeTile(const Input& input, const TokenBlock& block, int64_t column, Prefetch prefetch,
                                 bool streaming) {
  const int element = input.type == InputType::kBf16 ? 2 : 1;  // bytes
  const uint8_t* x = static_cast<const uint8_t*>(block.x) + column * element;
  const int64_t stride = input.features * element;
  Scratch s;
  bool usable = input.features - column >= kTileColumns;
  if (usable && input.type == InputType::kBf16) {
    LoadBf16(x, stride, block.rows, prefetch, s);
  } else if (usable) {
    usable = LoadFp8(x, stride, block.input_scales + column / kBlock, CeilDiv(input.features, kBlock), block.rows,
                     prefetch, s);
  }
  if (!usable || !FindScales(input.pow_2_scales, s, block.dequant_scales + column)) {
    TileFor(CpuLevel::kAvx2)(input, block, column, prefetch, streaming);
    return;
  }
  std::memset(s.mantissas + block.rows, 0, (kBlock - block.rows) * kTileColumns);
  std::memset(s.exponents + block.rows, 0, (kBlock - block.rows) * kTileColumns);

  const __m512i furthest = _mm512_set1_epi8(31);
  for (int first = 0; first < kTileColumns; first += kLane) {
    const __m512i amax_exponents =
        _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(s.amax_exponents + first)));
    for (int token = 0; token < kBlock; token += kVector) {
      __m512i below[kLane], mantissas[kLane];
      for (int i = 0; i < kLane; ++i) {
        const __m512i distance = _mm512_sub_epi8(amax_exponents, LoadLanes(s.exponents[token + i] + first));
        below[i] = _mm512_slli_epi16(_mm512_min_epu8(distance, furthest), 3);
      }
      Transpose(below);
      for (int i = 0; i < kLane; ++i) mantissas[i] = LoadLanes(s.mantissas[token + i] + first);
      Transpose(mantissas);
      for (int i = 0; i < kLane; ++i) {
        prefetch.Fetch();
        const __m512i values = Quantize(s, first + i, mantissas[i], below[i]);
        StoreTokens(values, block.tokens - token, streaming,
                    block.values + (column + first + i) * block.values_stride + token);
      }
    }
  }
}

}  // namespace

TileFunction Avx512Tile() noexcept {
  for (const bool supported : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
                               __builtin_cpu_supports("avx512dq") != 0, __builtin_cpu_supports("avx512vl") != 0,
                               __builtin_cpu_supports("avx512vbmi") != 0, TileFor(CpuLevel::kAvx2) != nullptr}) {
    if (!supported) return nullptr;
  }
  return QuantizeTile;
}

#else

TileFunction Avx512Tile() noexcept { return nullptr; }

#endif  // JAX_TSQ_X86_LEVELS

}  // namespace jax_tsq
