// The tile for any CPU: plain loops over 32-bit lanes, which compilers turn into vector code. All phases are inlined
// into one function for each level of instructions. Arithmetic is done on the low and on the high element of words,
// never on neighbours: lanes stay where they are until the transpose.

#include "cpu/tile.h"

#include <algorithm>
#include <cstring>

#include "cpu/instructions.h"
#include "cpu/tile_load.h"

namespace jax_tsq::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are packed into words with shifts");

constexpr int kLine = 16;  // tokens whose bytes the transpose brings together
constexpr int kLines = kBlock / kLine;
[[maybe_unused]] constexpr int kCacheLine = 64;
constexpr int kQuads = kLine / 4;  // groups of four tokens, whose codes make a word
constexpr uint32_t kLowElement = 0x0000FFFFu;
constexpr uint32_t kHighMagnitude = 0x7FFF0000u;
constexpr int16_t kBf16Infinity = 0x7F80;

// Words read as single elements.
using Element = int16_t __attribute__((may_alias));

// The tile between phases. All of it stays in the first cache, next to what is read.
struct Scratch {
  alignas(64) uint32_t words[kBlock][kWords];  // bf16 pairs, 0 outside the block
  alignas(64) int16_t amax[kTileColumns];      // bf16 bits, in the order of `words`
  alignas(64) float quant_scales[2][kWords];   // by position
  alignas(64) float dequant_scales[2][kWords];
  alignas(64) uint32_t quads[kQuads][kTileColumns];             // of one line: four tokens x one position
  alignas(64) uint32_t lines[kLines][kTileColumns][kLine / 4];  // sixteen tokens x one position
};

// Block maxima.

// The bits of bf16 magnitudes order like their values, with NaNs after infinity.
template <bool kSkipNans>
JAX_TSQ_INLINE void FindAmax(const uint32_t (*__restrict words)[kWords], int16_t* __restrict amax) {
  const Element* elements = reinterpret_cast<const Element*>(words);
  for (int i = 0; i < kTileColumns; ++i) {
    int16_t largest = 0;
    for (int row = 0; row < kBlock; ++row) {
      const int16_t magnitude = elements[row * kTileColumns + i] & 0x7FFF;
      if (kSkipNans && magnitude > kBf16Infinity) continue;
      largest = magnitude > largest ? magnitude : largest;
    }
    amax[i] = largest;
  }
}

JAX_TSQ_INLINE bool IsFinite(const int16_t* amax) {
  int16_t largest = 0;
  for (int i = 0; i < kTileColumns; ++i) largest = amax[i] > largest ? amax[i] : largest;
  return largest < kBf16Infinity;
}

// Scales.

JAX_TSQ_INLINE void FindScales(bool pow_2_scales, Scratch& s) {
  for (int i = 0; i < kWords; ++i) {
    const float low = QuantScale(BitsFloat(static_cast<uint32_t>(s.amax[2 * i]) << 16), pow_2_scales);
    const float high = QuantScale(BitsFloat(static_cast<uint32_t>(s.amax[2 * i + 1]) << 16), pow_2_scales);
    s.quant_scales[0][i] = low;
    s.quant_scales[1][i] = high;
    s.dequant_scales[0][i] = 1.0f / low;
    s.dequant_scales[1][i] = 1.0f / high;
  }
}

// Quantize.

// Bits of `a` where `mask` has ones, of `b` elsewhere: one instruction on AVX-512.
JAX_TSQ_INLINE uint32_t Select(uint32_t mask, uint32_t a, uint32_t b) { return ((a ^ b) & mask) ^ b; }

// Two rows' codes of a word's low and high element, in its low and high half.
template <class Level>
JAX_TSQ_INLINE uint32_t PairCodes(uint32_t row0, uint32_t row1, float low_scale, float high_scale) {
  const uint32_t low0 = Fp8Code<Level>((row0 << 16) & kHighMagnitude, low_scale);
  const uint32_t high0 = Fp8Code<Level>(row0 & kHighMagnitude, high_scale);
  const uint32_t low1 = Fp8Code<Level>((row1 << 16) & kHighMagnitude, low_scale);
  const uint32_t high1 = Fp8Code<Level>(row1 & kHighMagnitude, high_scale);
  const uint32_t codes0 = Select(kLowElement, low0, high0 << 16);
  const uint32_t codes1 = Select(kLowElement, low1, high1 << 16);
  const uint32_t codes = Select(0x00FF00FFu, codes0, codes1 << 8);
  const uint32_t signs = Select(0x00FF00FFu, row0 >> 8, row1);
  return Select(0x80808080u, signs, codes);
}

template <class Level>
JAX_TSQ_INLINE void QuantizeQuad(const uint32_t (*__restrict words)[kWords], const float (*__restrict scales)[kWords],
                                 uint32_t* __restrict quad) {
  for (int i = 0; i < kWords; ++i) {
    const uint32_t pair0 = PairCodes<Level>(words[0][i], words[1][i], scales[0][i], scales[1][i]);
    const uint32_t pair1 = PairCodes<Level>(words[2][i], words[3][i], scales[0][i], scales[1][i]);
    quad[i] = Select(kLowElement, pair0, pair1 << 16);
    quad[i + kWords] = Select(kLowElement, pair0 >> 16, pair1);
  }
}

// Transpose, as far as to lines; the store puts those in order.

JAX_TSQ_INLINE void TransposeLine(const uint32_t (*__restrict quads)[kTileColumns],
                                  uint32_t (*__restrict line)[kLine / 4]) {
  for (int i = 0; i < kTileColumns; ++i) {
    line[i][0] = quads[0][i];
    line[i][1] = quads[1][i];
    line[i][2] = quads[2][i];
    line[i][3] = quads[3][i];
  }
}

// An infinity gives its block the quant scale 0: its own code is a NaN too.
JAX_TSQ_INLINE void WriteNans(Scratch& s) {
  const Element* elements = reinterpret_cast<const Element*>(s.words);
  for (int token = 0; token < kBlock; ++token) {
    for (int i = 0; i < kTileColumns; ++i) {
      if ((elements[token * kTileColumns + i] & 0x7FFF) < kBf16Infinity) continue;
      const int position = i % 2 * kWords + i / 2;
      reinterpret_cast<uint8_t*>(s.lines[token / kLine][position])[token % kLine] = kFp8Nan;
    }
  }
}

// Store.

JAX_TSQ_INLINE void StoreTokens(const Scratch& s, int position, int tokens, [[maybe_unused]] bool streaming,
                                uint8_t* out) {
  if (tokens < kBlock) {
    for (int token = 0; token < tokens; token += kLine) {
      std::memcpy(out + token, s.lines[token / kLine][position], std::min(kLine, tokens - token));
    }
    return;
  }
#if defined(__SSE2__)
  if (streaming &&
      reinterpret_cast<uintptr_t>(out) % kCacheLine == 0) {  // part of a line would cost more than it saves
    for (int line = 0; line < kLines; ++line) {
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(s.lines[line][position]));
      _mm_stream_si128(reinterpret_cast<__m128i*>(out) + line, bytes);
    }
    return;
  }
#endif
  for (int line = 0; line < kLines; ++line) std::memcpy(out + line * kLine, s.lines[line][position], kLine);
}

// All phases.

template <class Level>
JAX_TSQ_INLINE void QuantizeTile(const Input& input, const TokenBlock& block, int64_t column, Prefetch prefetch,
                                 bool streaming) {
  const bool bf16 = input.type == InputType::kBf16;
  const int element = bf16 ? 2 : 1;  // bytes
  const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, input.features - column));
  const uint8_t* x = static_cast<const uint8_t*>(block.x) + column * element;
  int64_t stride = input.features * element;

  alignas(64) uint8_t full_rows[kBlock * kTileColumns * sizeof(uint16_t)];
  if (columns < kTileColumns) {
    for (int row = 0; row < block.rows; ++row) {
      uint8_t* full_row = full_rows + row * kTileColumns * element;
      std::memset(full_row, 0, kTileColumns * element);
      std::memcpy(full_row, x + row * stride, columns * element);
    }
    x = full_rows;
    stride = kTileColumns * element;
  }

  Scratch s;
  if (bf16) {
    LoadBf16(x, stride, block.rows, s.words);
  } else {
    LoadFp8(x, stride, block.input_scales + column / kBlock, CeilDiv(input.features, kBlock), block.rows, s.words);
  }
  if (block.rows < kBlock) std::memset(s.words[block.rows], 0, (kBlock - block.rows) * sizeof(s.words[0]));

  FindAmax<false>(s.words, s.amax);
  const bool finite = IsFinite(s.amax);
  if (!finite) FindAmax<true>(s.words, s.amax);
  FindScales(input.pow_2_scales, s);

  for (int line = 0; line < kLines; ++line) {
    for (int quad = 0; quad < kQuads; ++quad) {
      const int first = line * kLine + 4 * quad;
      for (int i = 0; i < kFetches / (kLines * kQuads); ++i) prefetch.Fetch();
      QuantizeQuad<Level>(s.words + first, s.quant_scales, s.quads[quad]);
    }
    TransposeLine(s.quads, s.lines[line]);
  }
  if (!finite) WriteNans(s);

  for (int position = 0; position < kTileColumns; ++position) {
    const int i = ColumnAt(input.type, position);
    if (i >= columns) continue;
    block.dequant_scales[column + i] = s.dequant_scales[position / kWords][position % kWords];
    StoreTokens(s, position, block.tokens, streaming, block.values + (column + i) * block.values_stride);
  }
}

// Levels.

void PortableTile(const Input& input, const TokenBlock& block, int64_t column, Prefetch prefetch, bool streaming) {
  QuantizeTile<Portable>(input, block, column, prefetch, streaming);
}

#ifdef JAX_TSQ_X86_LEVELS
JAX_TSQ_AVX2 void Avx2Tile(const Input& input, const TokenBlock& block, int64_t column, Prefetch prefetch,
                           bool streaming) {
  QuantizeTile<Fused>(input, block, column, prefetch, streaming);
}
#endif

}  // namespace

TileFunction TileFor(CpuLevel level) noexcept {
#ifdef JAX_TSQ_X86_LEVELS
  if (level == CpuLevel::kAvx512) return Avx512Tile();
  if (level == CpuLevel::kAvx2) return Avx2Tile;
#endif
  return PortableTile;
}

}  // namespace jax_tsq::cpu
