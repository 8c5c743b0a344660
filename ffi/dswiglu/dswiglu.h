// swiglu_backward_quantize: SwiGLU's gradient do1 as rows and as columns, and SwiGLU's result h as columns.

#ifndef JAX_TSQ_DSWIGLU_DSWIGLU_H_
#define JAX_TSQ_DSWIGLU_DSWIGLU_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/stream.h"
#include "core/swiglu.h"

namespace jax_tsq {

struct DswigluProblem {
  SwigluInput input;
  const void* dh;         // [batch, tokens, features] bf16, on a multiple of 16 bytes
  int64_t padded_tokens;  // P, a multiple of kBlock, at least PaddedTokens(...)
  bool aligned;           // sizes count in whole blocks
  // Of do1, which has the shape of gate_up: as `rows` and `ragged` quantize it.
  uint8_t* row_values;           // [batch, tokens, 2 * features] float8_e4m3fn; 0 past the sum of the sizes
  float* row_dequant_scales;     // [batch, 2 * features / kBlock, tokens]; 1 past the sum of the sizes
  uint8_t* column_values;        // [batch, 2 * features, P] float8_e4m3fn
  float* column_dequant_scales;  // [batch, P / kBlock, 2 * features]
  // Of h, as `ragged` quantizes it.
  uint8_t* h_values;        // [batch, features, P] float8_e4m3fn
  float* h_dequant_scales;  // [batch, P / kBlock, features]
  int32_t* padded_sizes;    // [batch, groups]
  // With weights only; 0 past the sum of the sizes.
  float* dweights;    // [batch, tokens]
  float* block_sums;  // [batch, features / kBlock, tokens]: what each block of features adds to dweights
};

// `level` is one that this machine can run.
void DswigluOnCpu(const DswigluProblem& problem, const Executor& executor, CpuLevel level);

// Enqueues the kernels. Returns null, or a message that lives forever.
const char* DswigluOnCuda(const DswigluProblem& problem, Stream stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_DSWIGLU_DSWIGLU_H_
