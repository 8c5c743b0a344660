// SwiGLU: what it takes, and its one sequence of float32 operations for host and device code, which decides every byte.
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

// A batch of token matrices for SwiGLU.
struct SwigluInput {
  const void* gate_up;         // [batch, tokens, 2 * features] bf16, gates and then ups, on a multiple of 16 bytes
  const float* weights;        // [batch, tokens], or null
  const int32_t* group_sizes;  // [batch, groups], any values, see core/groups.h: rows past their sum are not read
  int64_t batch;
  int64_t tokens;
  int64_t features;  // of h: a multiple of kBlock
  int64_t groups;
  bool pow_2_scales;
  float limit;  // kNoLimit for none
};

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

// `bound` is no NaN; a value that is stays one.
JAX_TSQ_HOST_DEVICE float AtMost(float value, float bound) {
#ifdef __CUDA_ARCH__
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(bound));
  return value;
#else
  return value > bound ? bound : value;
#endif
}
JAX_TSQ_HOST_DEVICE float AtLeast(float value, float bound) { return -AtMost(-value, -bound); }

// silu(gate) * up: h before its weight and its rounding. `limit` is looked at if kLimited.
template <bool kLimited>
JAX_TSQ_HOST_DEVICE float Swiglu(float gate, float up, float limit) {
  if (kLimited) {
    gate = AtMost(gate, limit);
    up = AtLeast(AtMost(up, limit), -limit);
  }
  return SiluOf(gate).value * up;
}

// Of one element, before any rounding to bf16.
struct SwigluGradients {
  float activation;  // silu(gate) * up
  float gate, up;    // gradients
};

// `dactivation` is dh * weight, the gradient of the activation.
template <bool kLimited>
JAX_TSQ_HOST_DEVICE SwigluGradients SwigluBackward(float gate, float up, float dactivation, float limit) {
  const float clamped_gate = kLimited ? AtMost(gate, limit) : gate;
  const float clamped_up = kLimited ? AtLeast(AtMost(up, limit), -limit) : up;
  const Silu silu = SiluOf(clamped_gate);
  SwigluGradients result = {silu.value * clamped_up, dactivation * clamped_up * silu.Derivative(),
                            dactivation * silu.value};
  if (kLimited) {
    const float up_magnitude = BitsFloat(FloatBits(up) & 0x7FFFFFFFu);
    result.gate = gate > limit ? 0.0f : result.gate;
    result.up = up_magnitude > limit ? 0.0f : result.up;
  }
  return result;
}

// The gradient of a row's weight is the sum of dh * activation: over each block of features as a balanced tree, of
// neighbours, then of neighbouring sums and so on; then over the blocks in their order, from 0 on. Any NaN is this one.
JAX_TSQ_HOST_DEVICE float WithOneNan(float sum) { return sum == sum ? sum : BitsFloat(0x7FC00000u); }

}  // namespace jax_tsq

#endif  // JAX_TSQ_CORE_SWIGLU_H_
