// swiglu_quantize: SwiGLU, whose result is stored as float8_e4m3fn rows alone.

#ifndef JAX_TSQ_SWIGLU_SWIGLU_H_
#define JAX_TSQ_SWIGLU_SWIGLU_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/stream.h"
#include "core/swiglu.h"

namespace jax_tsq {

struct SwigluProblem {
  SwigluInput input;
  uint8_t* values;        // [batch, tokens, features] float8_e4m3fn of h; 0 past the sum of the sizes
  float* dequant_scales;  // [batch, features / kBlock, tokens]; 1 past the sum of the sizes
};

// `level` is one that this machine can run.
void SwigluOnCpu(const SwigluProblem& problem, const Executor& executor, CpuLevel level);

// Enqueues the kernel. Returns null, or a message that lives forever.
const char* SwigluOnCuda(const SwigluProblem& problem, Stream stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_SWIGLU_SWIGLU_H_
