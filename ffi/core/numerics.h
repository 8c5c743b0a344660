// The block-scale rule, defined once for host and device code.
//
// Everything is IEEE float32: this header must not be compiled with fast-math, and host callers must run with
// subnormals enabled (see cpu/denormals.h).

#ifndef JAX_TSQ_CORE_NUMERICS_H_
#define JAX_TSQ_CORE_NUMERICS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define JAX_TSQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAX_TSQ_HOST_DEVICE inline
#endif

namespace jax_tsq {

// Tokens that share one scale, and input features that share one input scale.
inline constexpr int kBlock = 128;
// Largest finite float8_e4m3fn.
inline constexpr float kFp8Max = 448.0f;
// float8_e4m3fn has one NaN for each sign; every NaN is written as this one.
inline constexpr uint8_t kFp8Nan = 0x7F;

// In the type of `a`, neither of them negative.
template <class T>
JAX_TSQ_HOST_DEVICE constexpr T CeilDiv(T a, std::common_type_t<T> b) {
  return (a + b - 1) / b;
}

JAX_TSQ_HOST_DEVICE uint32_t FloatBits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

JAX_TSQ_HOST_DEVICE float BitsFloat(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

// Quantization scale of a block whose largest magnitude is `amax` (NaN if the block holds nothing else).
JAX_TSQ_HOST_DEVICE float QuantScale(float amax, bool pow_2_scales) {
  constexpr uint32_t kInfinity = 0x7F800000u;     // as float32 bits; also the exponent's mask
  constexpr uint32_t kLargestBf16 = 0x7F7F0000u;  // 0x1.FEp127
  if (!(amax > 0.0f)) return 1.0f;
  uint32_t bits = FloatBits(kFp8Max / amax);
  if (bits == kInfinity) bits = kLargestBf16;
  // Clearing the mantissa rounds down, so that amax * scale stays within range. 0 (an infinite amax) stays 0.
  return BitsFloat(pow_2_scales ? bits & kInfinity : bits);
}

}  // namespace jax_tsq

#endif  // JAX_TSQ_CORE_NUMERICS_H_
