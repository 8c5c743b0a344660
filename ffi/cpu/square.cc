#include "cpu/square.h"

#include <cstring>

#include "core/numerics.h"
#include "cpu/instructions.h"
#include "cpu/store.h"

namespace jax_tsq::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rows are packed into words with shifts");

constexpr int kQuads = kBlock / 4;  // groups of four rows, whose codes make a word

JAX_TSQ_INLINE void Round(const float* __restrict values, int count, Bf16Bits* __restrict elements) {
  for (int i = 0; i < count; ++i) elements[i] = RoundToElement(values[i]);
}

template <class Level>
JAX_TSQ_INLINE void Quantize(const SquareElements& elements, bool pow_2_scales, const SquareResult& result) {
  const Amax amax = FindAmax(elements.words[0], kBlock);
  const float quant_scale = QuantScale(amax, pow_2_scales);
  *result.dequant_scale = 1.0f / quant_scale;

  alignas(64) uint32_t quads[kQuads][kBlock];
  for (int quad = 0; quad < kQuads; ++quad) {
    alignas(64) uint8_t codes[4][kBlock];
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * quad + i;
      ConvertRow<Level>(elements.words[row], quant_scale, amax.finite, codes[i]);
      if (row < result.rows) {
        StoreBlock(codes[i], result.columns, result.streaming, result.values + row * result.values_stride);
      }
    }
    for (int i = 0; i < kBlock; ++i) {
      quads[quad][i] = codes[0][i] | codes[1][i] << 8 | codes[2][i] << 16 | static_cast<uint32_t>(codes[3][i]) << 24;
    }
  }
  for (int column = 0; column < result.columns; ++column) {
    uint32_t line[kQuads];
    for (int quad = 0; quad < kQuads; ++quad) line[quad] = quads[quad][column];
    StoreBlock(reinterpret_cast<const uint8_t*>(line), result.rows, result.streaming,
               result.transposed + column * result.transposed_stride);
  }
}

void PortableRound(const float* values, int count, Bf16Bits* elements) { Round(values, count, elements); }
void PortableQuantize(const SquareElements& elements, bool pow_2_scales, const SquareResult& result) {
  Quantize<Portable>(elements, pow_2_scales, result);
}

#ifdef JAX_TSQ_X86_LEVELS
JAX_TSQ_AVX2 void Avx2Round(const float* values, int count, Bf16Bits* elements) { Round(values, count, elements); }
JAX_TSQ_AVX2 void Avx2Quantize(const SquareElements& elements, bool pow_2_scales, const SquareResult& result) {
  Quantize<Fused>(elements, pow_2_scales, result);
}
#endif

}  // namespace

SquareFunctions SquareFor([[maybe_unused]] CpuLevel level) noexcept {
#ifdef JAX_TSQ_X86_LEVELS
  if (level != CpuLevel::kPortable) return {Avx2Round, Avx2Quantize};
#endif
  return {PortableRound, PortableQuantize};
}

}  // namespace jax_tsq::cpu
