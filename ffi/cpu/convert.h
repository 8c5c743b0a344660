// Elements that share one scale, converted where they are: a row of a block at a time. For rows.cc, square.cc and
// swiglu.cc.

#ifndef JAX_TSQ_CPU_CONVERT_H_
#define JAX_TSQ_CPU_CONVERT_H_

#include <cstdint>

#include "core/numerics.h"
#include "cpu/instructions.h"

namespace jax_tsq::cpu {

inline constexpr int kRowWords = kBlock / 2;  // of two bf16 each

// Memory read and written in other units than its own. `auto` would forget what is special about them.
using Bf16Bits = int16_t __attribute__((may_alias));
using Word = uint32_t __attribute__((may_alias, aligned(2)));
using Pair = uint16_t __attribute__((may_alias, aligned(1)));

// The bits of a largest magnitude. Of those of bf16, NaNs come after infinity.
struct Amax {
  int16_t bits;  // without NaNs
  bool finite;   // there are neither infinities nor NaNs
};

// `value` rounded to bf16, to nearest even; any NaN for a NaN.
JAX_TSQ_INLINE int16_t RoundToElement(float value) {
  const uint32_t bits = FloatBits(value);
  const uint32_t rounded = bits + 0x7FFFu + (bits >> 16 & 1);
  // Rounding makes an infinity of some NaNs, and a number of others.
  const uint32_t element = (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x00400000u : rounded;
  return static_cast<int16_t>(element >> 16);
}

template <bool kSkipNans>
JAX_TSQ_INLINE int16_t LargestMagnitude(const Word* words, int rows) {
  constexpr int16_t kInfinity = 0x7F80;
  const Bf16Bits* elements = reinterpret_cast<const Bf16Bits*>(words);
  int16_t largest = 0;
  for (int i = 0; i < rows * kBlock; ++i) {
    int16_t magnitude = elements[i] & 0x7FFF;
    if (kSkipNans && magnitude > kInfinity) magnitude = 0;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

JAX_TSQ_INLINE Amax FindAmax(const Word* words, int rows) {
  const int16_t largest = LargestMagnitude<false>(words, rows);
  if (largest < 0x7F80) return {largest, true};
  return {LargestMagnitude<true>(words, rows), false};
}

JAX_TSQ_INLINE float QuantScale(const Amax& amax, bool pow_2_scales) {
  return jax_tsq::QuantScale(BitsFloat(static_cast<uint32_t>(amax.bits) << 16), pow_2_scales);
}

// Arithmetic is done on the low and on the high element of words, so that lanes stay where they are.
template <class Level>
JAX_TSQ_INLINE void ConvertRow(const Word* __restrict words, float quant_scale, bool finite,
                               uint8_t* __restrict values) {
  constexpr uint32_t kHighMagnitude = 0x7FFF0000u;
  Pair* const pairs = reinterpret_cast<Pair*>(values);
  for (int i = 0; i < kRowWords; ++i) {
    const uint32_t low = Fp8Code<Level>((words[i] << 16) & kHighMagnitude, quant_scale);
    const uint32_t high = Fp8Code<Level>(words[i] & kHighMagnitude, quant_scale);
    const uint32_t signs = (words[i] >> 8 & 0x80u) | (words[i] >> 16 & 0x8000u);
    pairs[i] = static_cast<uint16_t>((low & 0x7Fu) | (high & 0x7Fu) << 8 | signs);
  }
  if (finite) return;
  // An infinity gives its block the quant scale 0: its own code is a NaN too.
  const Bf16Bits* elements = reinterpret_cast<const Bf16Bits*>(words);
  for (int i = 0; i < kBlock; ++i) {
    if ((elements[i] & 0x7FFF) >= 0x7F80) values[i] = kFp8Nan;
  }
}

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_CONVERT_H_
