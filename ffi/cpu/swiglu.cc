#include "cpu/swiglu.h"

#include "core/numerics.h"
#include "core/swiglu.h"
#include "cpu/instructions.h"

namespace jax_tsq::cpu {
namespace {

JAX_TSQ_INLINE float FloatOf(int16_t element) {
  return BitsFloat(static_cast<uint32_t>(static_cast<uint16_t>(element)) << 16);
}

JAX_TSQ_INLINE void Forward(const Bf16Bits* __restrict gate, const Bf16Bits* __restrict up, float weight, float limit,
                            Bf16Bits* __restrict h) {
  for (int i = 0; i < kBlock; ++i) {
    h[i] = RoundToElement(Swiglu<true>(FloatOf(gate[i]), FloatOf(up[i]), limit) * weight);
  }
}

JAX_TSQ_INLINE void Differentiate(const Bf16Bits* __restrict gate, const Bf16Bits* __restrict up,
                                  const Bf16Bits* __restrict dh, float weight, float limit, Bf16Bits* __restrict dgate,
                                  Bf16Bits* __restrict dup, Bf16Bits* __restrict h, float* __restrict products) {
  for (int i = 0; i < kBlock; ++i) {
    const float gradient = FloatOf(dh[i]);
    const SwigluGradients result = SwigluBackward<true>(FloatOf(gate[i]), FloatOf(up[i]), gradient * weight, limit);
    dgate[i] = RoundToElement(result.gate);
    dup[i] = RoundToElement(result.up);
    h[i] = RoundToElement(result.activation * weight);
    products[i] = gradient * result.activation;
  }
}

JAX_TSQ_INLINE float Sum(float (&products)[kBlock]) {
  for (int count = kBlock / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) products[i] = products[2 * i] + products[2 * i + 1];
  }
  return WithOneNan(products[0]);
}

JAX_TSQ_INLINE float Backward(const Bf16Bits* gate, const Bf16Bits* up, const Bf16Bits* dh, float weight, float limit,
                              Bf16Bits* dgate, Bf16Bits* dup, Bf16Bits* h) {
  float products[kBlock];
  Differentiate(gate, up, dh, weight, limit, dgate, dup, h, products);
  return Sum(products);
}

void PortableForward(const Bf16Bits* gate, const Bf16Bits* up, float weight, float limit, Bf16Bits* h) {
  Forward(gate, up, weight, limit, h);
}
float PortableBackward(const Bf16Bits* gate, const Bf16Bits* up, const Bf16Bits* dh, float weight, float limit,
                       Bf16Bits* dgate, Bf16Bits* dup, Bf16Bits* h) {
  return Backward(gate, up, dh, weight, limit, dgate, dup, h);
}

#ifdef JAX_TSQ_X86_LEVELS
JAX_TSQ_AVX2 void Avx2Forward(const Bf16Bits* gate, const Bf16Bits* up, float weight, float limit, Bf16Bits* h) {
  Forward(gate, up, weight, limit, h);
}
JAX_TSQ_AVX2 float Avx2Backward(const Bf16Bits* gate, const Bf16Bits* up, const Bf16Bits* dh, float weight, float limit,
                                Bf16Bits* dgate, Bf16Bits* dup, Bf16Bits* h) {
  return Backward(gate, up, dh, weight, limit, dgate, dup, h);
}
#endif

}  // namespace

SwigluFunctions SwigluFor([[maybe_unused]] CpuLevel level) noexcept {
#ifdef JAX_TSQ_X86_LEVELS
  if (level != CpuLevel::kPortable) return {Avx2Forward, Avx2Backward};
#endif
  return {PortableForward, PortableBackward};
}

}  // namespace jax_tsq::cpu
