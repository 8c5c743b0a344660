// ragged_quantize: what quantize_rows and ragged_transpose_quant give, from one read.

#ifndef JAX_TSQ_DUAL_DUAL_H_
#define JAX_TSQ_DUAL_DUAL_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/input.h"
#include "core/stream.h"

namespace jax_tsq {

struct DualProblem {
  Input input;                 // of kBf16
  const int32_t* group_sizes;  // [batch, groups]; any values, see core/groups.h
  int64_t groups;
  int64_t padded_tokens;         // P, a multiple of kBlock, at least PaddedTokens(...)
  bool aligned;                  // sizes count in whole blocks
  uint8_t* row_values;           // [batch, tokens, features] float8_e4m3fn; 0 past the sum of the sizes
  float* row_dequant_scales;     // [batch, CeilDiv(features, kBlock), tokens]; 1 past the sum of the sizes
  uint8_t* column_values;        // [batch, features, P] float8_e4m3fn
  float* column_dequant_scales;  // [batch, P / kBlock, features]
  int32_t* padded_sizes;         // [batch, groups]
};

// `level` is one that this machine can run.
void DualOnCpu(const DualProblem& problem, const Executor& executor, CpuLevel level);

// Enqueues the kernel. Returns null, or a message that lives forever.
const char* DualOnCuda(const DualProblem& problem, Stream stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_DUAL_DUAL_H_
