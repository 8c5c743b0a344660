// How code is compiled for each level of instructions, and the conversion that all of them share. For tile*.cc.

#ifndef JAX_TSQ_CPU_INSTRUCTIONS_H_
#define JAX_TSQ_CPU_INSTRUCTIONS_H_

#include <algorithm>
#include <cstdint>

#include "core/cpu_level.h"
#include "core/numerics.h"

#ifdef JAX_TSQ_X86_LEVELS
#define JAX_TSQ_AVX2 __attribute__((target("avx2,fma")))
#define JAX_TSQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma")))
#include <immintrin.h>
#endif

// Inlined code gets the instruction set of the function it ends up in.
#define JAX_TSQ_INLINE inline __attribute__((always_inline))

namespace jax_tsq::cpu {

struct Portable {
  // The product in Fp8Code is exact, so a fused operation would give the same.
  static JAX_TSQ_INLINE float MultiplyAdd(float a, float b, float c) { return a * b + c; }
};

struct Fused {
  static JAX_TSQ_INLINE float MultiplyAdd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
};

// The float8_e4m3fn of |value| * quant_scale, in the low byte; the others hold anything. Finite values only, and
// without saturation: the scale keeps values within range.
template <class Level>
JAX_TSQ_INLINE uint32_t Fp8Code(uint32_t magnitude, float quant_scale) {
  const float value = BitsFloat(magnitude) * quant_scale;
  // 2^e, where a last place of the fp8 is worth 2^(e - 3): subnormals have the last place of the smallest normal.
  constexpr int32_t kSmallestNormal = 121 << 23;
  const int32_t at_least = std::max(static_cast<int32_t>(FloatBits(value)), kSmallestNormal);
  const uint32_t power = static_cast<uint32_t>(at_least) & 0x7F800000u;
  // In a sum with 2^(e + 20) the last place of a float32 is just that, so the addition rounds, to nearest even, and
  // leaves the last places counted in the low bits. The code is that count + 8 * (e - 1 + bias) of the fp8, where the
  // low byte of power >> 20 has 8 * (e + bias) of the float32: 7 more units of 2^e bring the difference, 56 modulo 256.
  const float sum = Level::MultiplyAdd(BitsFloat(power), 0x1p20f + 7, value);
  return FloatBits(sum) + (power >> 20);
}

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_INSTRUCTIONS_H_
