// SwiGLU as one sequence of float32 operations, defined once for host and device code, so that every byte is decided.
//
// h = bf16(silu(gate) * up * weight). Where no fma is named every operation is rounded by itself, products from left to
// right. Like numerics.h, this header must not be compiled with fast-math, nor with contraction of products and sums.

#ifndef JAX_TSQ_CORE_SWIGLU_H_
#define JAX_TSQ_CORE_SWIGLU_H_

#include <cstdint>
#include <limits>

#include "core/numerics.h"

namespace jax_tsq {

// Clamps as in models with a `swiglu_limit` (gpt-oss, DeepSeek-V4): gate from above, up from both sides. What was
// clamped has no gradient. NaNs stay.
inline constexpr float kNoLimit = std::numeric_limits<float>::infinity();

// As attributes and callers have it: none where it is not positive, or a NaN.
JAX_TSQ_HOST_DEVICE float LimitOf(float limit) { return limit > 0.0f ? limit : kNoLimit; }

JAX_TSQ_HOST_DEVICE float Fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// 1 / value, rounded to nearest, for values from 1 to 2^125.
JAX_TSQ_HOST_DEVICE float Reciprocal(float value) {
#ifdef __CUDA_ARCH__
  // What the exact division does here, without its test for other values.
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(value));
  return __fmaf_rn(estimate, __fmaf_rn(-value, estimate, 1.0f), estimate);
#else
  return 1.0f / value;
#endif
}

struct Silu {
  float value;
  float sigmoid;

  JAX_TSQ_HOST_DEVICE float Derivative() const { return Fma(value, 1.0f - sigmoid, sigmoid); }
};

// Gates below -86 count as -86, whose silu is -4e-36: nothing is subnormal, and -inf is no NaN. Rounded to bf16, silu
// is the exactly rounded one for every bf16 gate from -86 on.
JAX_TSQ_HOST_DEVICE Silu SiluOf(float gate) {
  constexpr float kRange = 86.0f;
  constexpr float kShift = 0x1.8p23f;
  const float low = gate < -kRange ? -kRange : gate;
  const float argument = low < kRange ? low : kRange;  // no NaN
  // exp(-argument) = 2^n exp(r), |r| <= ln(2) / 2, where n are the low bits of `shifted`
  const float shifted = Fma(argument, -0x1.715476p+0f, kShift);
  const float r = Fma(shifted - kShift, -0x1.62e430p-1f, -argument);
  float p = Fma(0x1.106250p-7f, r, 0x1.572a64p-5f);
  p = Fma(p, r, 0x1.5557b0p-3f);
  p = Fma(p, r, 0x1.fffdfcp-2f);
  p = Fma(p, r, 1.0f);
  p = Fma(p, r, 1.0f);
  const float exponential = BitsFloat(FloatBits(p) + (FloatBits(shifted) << 23));
  const float sigmoid = Reciprocal(1.0f + exponential);
  return {low * sigmoid, sigmoid};
}

// The gate and the up of one element, clamped.
struct GateUp {
  float gate, up;
  bool gate_clamped, up_clamped;

  JAX_TSQ_HOST_DEVICE GateUp(float gate, float up, float limit)
      : gate(gate > limit ? limit : gate), up(up), gate_clamped(gate > limit), up_clamped(up > limit || up < -limit) {
    if (up > limit) this->up = limit;
    if (up < -limit) this->up = -limit;
  }
};

// silu(gate) * up: h before its weight and its rounding.
JAX_TSQ_HOST_DEVICE float SwiGlu(float gate, float up, float limit) {
  const GateUp clamped(gate, up, limit);
  return SiluOf(clamped.gate).value * clamped.up;
}

// Of one element, before any rounding to bf16.
struct SwiGluGradients {
  float activation;  // silu(gate) * up
  float gate, up;    // gradients
};

// `dactivation` is dh * weight, the gradient of the activation.
JAX_TSQ_HOST_DEVICE SwiGluGradients BackwardSwiGlu(float gate, float up, float dactivation, float limit) {
  const GateUp clamped(gate, up, limit);
  const Silu silu = SiluOf(clamped.gate);
  const float dgate = dactivation * clamped.up * silu.Derivative();
  const float dup = dactivation * silu.value;
  return {silu.value * clamped.up, clamped.gate_clamped ? 0.0f : dgate, clamped.up_clamped ? 0.0f : dup};
}

// The gradient of a row's weight is the sum of dh * activation: over each block of features as a balanced tree, of
// neighbours, then of neighbouring sums and so on; then over the blocks in their order, from 0 on.

}  // namespace jax_tsq

#endif  // JAX_TSQ_CORE_SWIGLU_H_
