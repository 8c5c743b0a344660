// ragged_transpose_quant: group sizes that only the device knows, one padded result.

#ifndef JAX_TSQ_RAGGED_RAGGED_H_
#define JAX_TSQ_RAGGED_RAGGED_H_

#include <cstdint>

#include "core/cpu_level.h"
#include "core/executor.h"
#include "core/input.h"
#include "core/stream.h"

namespace jax_tsq {

struct RaggedProblem {
  Input input;
  const int32_t* group_sizes;  // [batch, groups]; any values, see core/groups.h
  int64_t groups;
  int64_t padded_tokens;  // P, a multiple of kBlock, at least PaddedTokens(...)
  bool aligned;           // sizes count in whole blocks
  bool flat;              // group i of `values` is a contiguous [features, padded_i]
  uint8_t* values;        // [batch, features, P] or [batch, features * P] float8_e4m3fn
  float* dequant_scales;  // [batch, P / kBlock, features]
  int32_t* padded_sizes;  // [batch, groups]
};

// `level` is one that this machine can run.
void RaggedOnCpu(const RaggedProblem& problem, const Executor& executor, CpuLevel level);

// Enqueues the kernel. Returns null, or a message that lives forever.
const char* RaggedOnCuda(const RaggedProblem& problem, Stream stream);

}  // namespace jax_tsq

#endif  // JAX_TSQ_RAGGED_RAGGED_H_
