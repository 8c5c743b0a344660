// The tile's first phase on the host: rows of x become words of two bf16. For tile.cc only.

#ifndef JAX_TSQ_CPU_TILE_LOAD_H_
#define JAX_TSQ_CPU_TILE_LOAD_H_

#include <cstdint>
#include <cstring>

#include "core/numerics.h"
#include "cpu/instructions.h"
#include "cpu/tile.h"

namespace jax_tsq::cpu {

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

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_TILE_LOAD_H_
