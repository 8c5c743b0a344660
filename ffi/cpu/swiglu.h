// SwiGLU on the host: a block of features of one row at a time.

#ifndef JAX_TSQ_CPU_SWIGLU_H_
#define JAX_TSQ_CPU_SWIGLU_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "cpu/convert.h"

namespace jax_tsq::cpu {

// All arrays have kBlock elements, and none overlap.
struct SwigluFunctions {
  void (*forward)(const Bf16Bits* gate, const Bf16Bits* up, float weight, float limit, Bf16Bits* h);
  // Returns the block's part of the weight's gradient.
  float (*backward)(const Bf16Bits* gate, const Bf16Bits* up, const Bf16Bits* dh, float weight, float limit,
                    Bf16Bits* dgate, Bf16Bits* dup, Bf16Bits* h);
};

// For a level that this machine can run. All of them write the same bytes.
SwigluFunctions SwigluFor(CpuLevel level) noexcept;

}  // namespace jax_tsq::cpu

#endif  // JAX_TSQ_CPU_SWIGLU_H_
