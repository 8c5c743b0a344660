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

#include "cpu/instructions.h"
#include "cpu/tile.h"

namespace jax_tsq::cpu {

#ifdef JAX_TSQ_X86_LEVELS

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics of GCC 12
#endif

namespace {

constexpr int kLane = 16;    // bytes: as many columns are transposed together
constexpr int kVector = 64;  // bytes: as many tokens of each
static_assert(kTileColumns == kVector);

// An exponent counts from amax's less this: 8 times that is still a byte. Elements below, like all bf16 subnormals,
// have code 0.
constexpr int kExponents = 31;
// Codes are raised by this: then 0 stands for code 0, and 1 to kSubnormals for those that the formula does not give.
constexpr int kRaise = 25;
constexpr int kSubnormals = kRaise + 7;
constexpr uint16_t kBf16Infinity = 0x7F80;

struct CodeTable {
  // What 8 times the exponent is to be lowered by: for pow_2_scales or not, a mantissa of amax, a mantissa.
  alignas(kVector) uint8_t lower[2][128][128];

  CodeTable() {
    for (int pow_2_scales = 0; pow_2_scales < 2; ++pow_2_scales) {
      for (uint32_t amax = 0; amax < 128; ++amax) {
        const float quant_scale = QuantScale(BitsFloat(0x3F800000u | amax << 16), pow_2_scales != 0);
        for (uint32_t mantissa = 0; mantissa < 128; ++mantissa) {
          const uint32_t code = Fp8Code<Portable>(0x3F800000u | mantissa << 16, quant_scale);
          lower[pow_2_scales][amax][mantissa] = static_cast<uint8_t>(8 * kExponents - kRaise - code);
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
  alignas(kVector) uint8_t lowest[kTileColumns];  // exponents: kExponents below that of amax
  const uint8_t* lower[kTileColumns];             // the lines of the table
};

using Floats16 __attribute__((vector_size(64))) = float;
using Words16 __attribute__((vector_size(64))) = uint32_t;

// Bits of `a` where `mask` has ones, of `b` elsewhere.
JAX_TSQ_AVX512 JAX_TSQ_INLINE __m512i Select(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(a, b, mask, 0xE4);
}

// Load, and block maxima. Rows are `stride` bytes apart.

JAX_TSQ_AVX512 JAX_TSQ_INLINE void LoadBf16(const uint8_t* x, int64_t stride, int rows, Scratch& s) {
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
                                           int64_t scales_stride, int rows, Scratch& s) {
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

// Returns whether the table has all columns.
JAX_TSQ_AVX512 JAX_TSQ_INLINE bool FindScales(bool pow_2_scales, Scratch& s, float* dequant_scales) {
  static const CodeTable table;
  bool usable = true;
  for (int i = 0; i < kTileColumns; ++i) {
    usable &= s.amax[i] < kBf16Infinity && (s.amax[i] == 0 || s.amax[i] >= kExponents << 7);
  }
  if (!usable) return false;
  for (int i = 0; i < kTileColumns; ++i) {
    const float quant_scale = QuantScale(BitsFloat(uint32_t{s.amax[i]} << 16), pow_2_scales);
    s.quant_scales[i] = quant_scale;
    dequant_scales[i] = 1.0f / quant_scale;
    // Zeros are as far below 255 as they can be.
    s.lowest[i] = static_cast<uint8_t>((s.amax[i] == 0 ? 255 : s.amax[i] >> 7) - kExponents);
  }
  for (int i = 0; i < kTileColumns; ++i) s.lower[i] = table.lower[pow_2_scales][s.amax[i] & 0x7F];
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

// The codes of 64 tokens, some of them subnormal.
JAX_TSQ_AVX512 __attribute__((noinline)) __m512i ComputeCodes(__m512i mantissas, __m512i exponents, int lowest,
                                                              float quant_scale) {
  alignas(kVector) uint8_t mantissa[kVector], exponent[kVector], code[kVector];
  _mm512_store_si512(mantissa, mantissas);
  _mm512_store_si512(exponent, exponents);
  for (int i = 0; i < kVector; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(lowest + exponent[i] / 8) << 23 | (mantissa[i] & 0x7Fu) << 16;
    code[i] = static_cast<uint8_t>(Fp8Code<Fused>(magnitude, quant_scale));
  }
  return _mm512_load_si512(code);
}

// `exponents` are 8 times those above the column's lowest.
JAX_TSQ_AVX512 JAX_TSQ_INLINE __m512i Quantize(const Scratch& s, int column, __m512i mantissas, __m512i exponents) {
  const uint8_t* line = s.lower[column];
  const __m512i lower = _mm512_permutex2var_epi8(_mm512_load_si512(line), mantissas, _mm512_load_si512(line + kVector));
  const __m512i raised = _mm512_subs_epu8(exponents, lower);
  __m512i code = _mm512_subs_epu8(raised, _mm512_set1_epi8(kRaise));
  const __m512i minus_one = _mm512_set1_epi8(-1);
  if (_mm512_cmplt_epu8_mask(_mm512_add_epi8(raised, minus_one), _mm512_set1_epi8(kSubnormals)) != 0) {
    code = ComputeCodes(mantissas, exponents, s.lowest[column], s.quant_scales[column]);
  }
  return Select(_mm512_set1_epi8(-0x80), mantissas, code);
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
    LoadBf16(x, stride, block.rows, s);
  } else if (usable) {
    usable = LoadFp8(x, stride, block.input_scales + column / kBlock, CeilDiv(input.features, kBlock), block.rows, s);
  }
  if (!usable || !FindScales(input.pow_2_scales, s, block.dequant_scales + column)) {
    TileFor(CpuLevel::kAvx2)(input, block, column, prefetch, streaming);
    return;
  }
  std::memset(s.mantissas + block.rows, 0, (kBlock - block.rows) * kTileColumns);
  std::memset(s.exponents + block.rows, 0, (kBlock - block.rows) * kTileColumns);

  streaming = streaming && block.tokens == kBlock && block.values_stride % kVector == 0 &&
              reinterpret_cast<uintptr_t>(block.values) % kVector == 0;
  for (int first = 0; first < kTileColumns; first += kLane) {
    const __m512i lowest = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(s.lowest + first)));
    for (int token = 0; token < kBlock; token += kVector) {
      __m512i exponents[kLane], mantissas[kLane];
      for (int i = 0; i < kLane; ++i) {
        const __m512i above = _mm512_subs_epu8(LoadLanes(s.exponents[token + i] + first), lowest);
        exponents[i] = _mm512_slli_epi16(above, 3);
      }
      Transpose(exponents);
      for (int i = 0; i < kLane; ++i) mantissas[i] = LoadLanes(s.mantissas[token + i] + first);
      Transpose(mantissas);

      const int tokens = std::clamp(block.tokens - token, 0, kVector);
      const __mmask64 stored = tokens == 0 ? 0 : ~uint64_t{0} >> (kVector - tokens);
      uint8_t* out = block.values + (column + first) * block.values_stride + token;
      for (int i = 0; i < kLane; ++i, out += block.values_stride) {
        if (i % (kBlock / kFetches) == 0) prefetch.Fetch();
        const __m512i values = Quantize(s, first + i, mantissas[i], exponents[i]);
        if (streaming) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(out), values);
        } else {
          _mm512_mask_storeu_epi8(out, stored, values);
        }
      }
    }
  }
}

}  // namespace

TileFunction Avx512Tile() noexcept { return QuantizeTile; }

#endif  // JAX_TSQ_X86_LEVELS

}  // namespace jax_tsq::cpu
